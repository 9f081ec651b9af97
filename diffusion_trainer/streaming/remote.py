"""Objects at URLs: fsspec's backends, and the many ways in which they say that something is wrong, in four."""

import errno
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming import pipes
from diffusion_trainer.streaming.backends import EXTRAS, options_of
from diffusion_trainer.streaming.retries import Result, Retries, Sick, Twice
from diffusion_trainer.streaming.urls import is_pipe

FULL = (errno.ENOSPC, errno.EDQUOT)  # a disk of this machine
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}  # botocore's, Google's
S3_HIDES = " (S3 says so of an object that is not there, too, to those who may not list its bucket)"
MAX_QUOTED = 300  # characters of somebody else's message


class Gone(Exception):
    """The store says that it has no such object."""


class NoRange(Sick):
    """The store refuses a range of bytes: perhaps it lies beyond the object's end."""


class TooMuch(Sick):
    """More bytes than were asked for; the rest was not taken."""


@dataclass(frozen=True)
class Remote:
    """Single requests for objects. They raise Sick for what may pass; Gone; UserError for what a person must mend;
    OSError (FULL) if this machine's disk is full.

    timeout_seconds: a connection that sends nothing for so long has ended; a transfer may take any time.
    """

    timeout_seconds: float
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    allow_pipe: bool = False

    def __post_init__(self):
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive, not {self.timeout_seconds}")

    def get(self, url: str, path: Path, at_most: int) -> None:
        """The whole object into a file. TooMuch once it is known to be larger, part of it being in the file."""
        if is_pipe(url):
            with path.open("wb") as file:
                return self._run(url, _Counted(file.write, at_most))
        system, name = self._system(url)
        with _translated(url):  # one request; `open().read()` would make one for every few megabytes
            system.get_file(name, str(path), callback=_AtMost(at_most))

    def cat(self, url: str, first: int | None = None, last: int | None = None) -> bytes:
        """The object, or its bytes [first, last) as far as it has them."""
        if is_pipe(url):
            pieces: list[bytes] = []
            self._run(url, pieces.append)
            return b"".join(pieces)
        system, name = self._system(url)
        with _translated(url):
            return system.cat_file(name, start=first, end=last)

    def put(self, url: str, data: bytes) -> None:
        """Writes the object; NotImplementedError where the store takes none."""
        system, name = self._system(url)
        with _translated(url), system.open(name, "wb") as file:
            file.write(data)

    def size(self, url: str) -> int | None:
        """Bytes of the object; None where the store does not tell."""
        if is_pipe(url):
            return None
        system, name = self._system(url)
        try:
            with _translated(url):
                return system.info(name).get("size")
        except Gone:
            return None  # what fsspec's http says for a server that answers no HEAD

    def glob(self, pattern: str) -> list[str]:
        """URLs of the objects or folders that it names, sorted; UserError where the store cannot list."""
        if pattern.startswith(("http://", "https://")) or is_pipe(pattern):
            raise UserError(
                f"{pattern}: such a store cannot list its folders; name them with braces, {{000..007}}. "
                "In the last part of a URL, * works: the index.json in that folder knows the names"
            )
        system, name = self._system(pattern)
        with _translated(pattern):
            return sorted(system.unstrip_protocol(found) for found in system.glob(name))

    def _run(self, url: str, write: Callable[[bytes], Any]) -> None:
        if not self.allow_pipe:
            raise UserError(f"{url}: it runs a shell command; set allow_pipe=true if that is what you want")
        _check_named(url)
        pipes.run(url, write, self.timeout_seconds)

    def _system(self, url: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """fsspec's file system, which it keeps (a forked process gets its own), and the object's name in it."""
        protocol = url.partition("://")[0]
        _check_named(f"{url} {self.storage_options}")
        try:
            options = options_of(protocol, self.timeout_seconds, self.storage_options)
            with _translated(url):
                return fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            needed = f"pip install 'diffusion-trainer[{extra}]'" if extra else str(error)
            raise UserError(f"{url}: what opens {protocol}:// is not installed; {needed}") from error


def _check_named(text: str) -> None:
    """UserError if it has the name of a variable where its value should be: this environment has none."""
    if missing := re.search(r"\$\{oc\.env:(\w+)", text):
        raise UserError(f"export {missing[1]}=... first: the shards' URL, or data.store.storage_options, names it")


def read(remote: Remote, retries: Retries, url: str, parse: Callable[[bytes], Result]) -> Result:
    """A small object, parsed; Gone if it is not there, or the UserError of `parse`."""
    twice = Twice()

    def attempt() -> Result:
        try:
            data = remote.cat(url)
        except Gone as gone:
            twice(Gone, str(gone))
            raise
        try:
            return parse(data)
        except UserError as error:
            twice(data, str(error))
            raise

    return retries(url, attempt)


def is_there(remote: Remote, retries: Retries, url: str) -> bool:
    twice = Twice()

    def attempt() -> bool:
        try:
            remote.cat(url, 0, 1)
        except NoRange:  # it is empty
            return True
        except Gone as gone:
            twice(Gone, str(gone))
            return False
        return True

    return retries(url, attempt)


@dataclass
class _Counted:
    write: Callable[[bytes], Any]
    at_most: int
    count: int = 0

    def __call__(self, data: bytes) -> None:
        self.count += len(data)
        self.write(data)
        _check(self.count, self.at_most)


class _AtMost(Callback):
    """What fsspec tells of a transfer. An endless page must not fill the disk."""

    def __init__(self, at_most: int):
        super().__init__()
        self.at_most = at_most

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        _check(self.value, self.at_most)


def _check(count: int, at_most: int) -> None:
    if count > at_most:
        raise TooMuch(f"more than {at_most} bytes came")


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except (Sick, UserError, ImportError, NotImplementedError):
        raise
    except Exception as error:  # the backends' exceptions have no other base in common
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise _translation(url, error) from error


def _translation(url: str, error: Exception) -> Exception:
    # aiohttp's and gcsfs' exceptions carry HTTP's status by these names; s3fs makes them FileNotFoundError and so on.
    status = getattr(error, "status", None) or getattr(error, "code", None)
    said = f"{type(error).__name__}: {error}"[:MAX_QUOTED]
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return Gone(said)
    if status == 416 or (isinstance(error, OSError) and error.errno == errno.EINVAL):  # s3fs' word for 416
        return NoRange(said)
    forbidden = isinstance(error, PermissionError) or status in (401, 403, 407) or str(error).startswith("Forbidden")
    if forbidden or type(error).__name__ in NO_CREDENTIALS:
        return UserError(
            f"{url} may not be read or written ({said}): check the credentials, in the environment or storage_options."
            + S3_HIDES * url.startswith("s3")
        )
    if isinstance(error, TypeError) or type(error) is ValueError:  # not its subclasses: JSON that a sick store sent
        return UserError(f"{url}: {said}; is the URL right, and do the storage_options fit it?")
    return Sick(said, _asked_seconds(getattr(error, "headers", None) or {}))


def _asked_seconds(headers: Mapping[str, str]) -> float:
    """HTTP's Retry-After: seconds, or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0  # absent, or nonsense
