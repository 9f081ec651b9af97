"""Objects at URLs, through fsspec's backends."""

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import fsspec
from fsspec.callbacks import Callback

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming import pipes
from diffusion_trainer.streaming.answers import Gone, NoRange, translated
from diffusion_trainer.streaming.backends import EXTRAS, HTTP_STREAM, STREAM, options_of
from diffusion_trainer.streaming.retries import AGAIN, Result, Retries, Sick, Twice
from diffusion_trainer.streaming.stores import is_glob, matching
from diffusion_trainer.streaming.urls import is_pipe

HTTP = ("http://", "https://")
# A forked process that dropped its parent's would close their connections in the loop that it shares with the parent,
# who then waits for answers on these for ever.
KEPT: set[fsspec.AbstractFileSystem] = set()
WITNESSES = 4  # shards that are asked for to see whether a store is up
CHUNK = 1 << 20  # bytes of a stream that come at a time, at most
MAX_SMALL = 1 << 28  # bytes of an object that is read at once: of an index, two million shards


class NothingThere(PassingError):
    """The store has neither the object nor what else should be there."""


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
        counted = _AtMost(at_most)
        if is_pipe(url):
            with path.open("wb") as file, closing(self.stream(url)) as pieces:
                for data in pieces:
                    counted.relative_update(file.write(data))
            return
        system, name = self._system(url)
        with translated(url):  # one request; `open().read()` would make one for every few megabytes
            system.get_file(name, str(path), callback=counted)

    def whole(self, url: str, at_most: int) -> bytes:
        """The whole object, which is in memory only once it is known to be no larger: else TooMuch."""
        try:
            with TemporaryDirectory(prefix="object-") as folder:
                path = Path(folder) / "object"
                self.get(url, path, at_most)
                return path.read_bytes()
        except OSError as error:
            raise UserError(f"{url} cannot be read by way of the folder {gettempdir()} ({error})") from error

    def cat(self, url: str, first: int, last: int) -> bytes:
        """Bytes [first, last) of the object, as far as it has them; what knows no ranges sends more."""
        if is_pipe(url):
            found = bytearray()
            with closing(self.stream(url)) as pieces:
                while len(found) <= last and (data := next(pieces, b"")):
                    found += data
            return bytes(found)
        system, name = self._system(url)
        with translated(url):
            return system.cat_file(name, start=first, end=last)

    def stream(self, url: str) -> Generator[bytes, None, None]:
        """The object from its start on, in pieces as they come."""
        if is_pipe(url):
            self._check_allowed(url)
            return (yield from pipes.output(url, self.timeout_seconds))
        system, name = self._system(url)
        options = HTTP_STREAM if url.startswith(HTTP) else STREAM
        with translated(url), system.open(name, "rb", **options) as file:
            while data := file.read(CHUNK):
                yield data

    def put(self, url: str, data: bytes) -> None:
        """Writes the object; NotImplementedError where the store takes none."""
        system, name = self._system(url)
        with translated(url), system.open(name, "wb") as file:
            file.write(data)

    def size(self, url: str) -> int | None:
        """Bytes of the object; None where the store does not tell."""
        if is_pipe(url):
            return None
        system, name = self._system(url)
        try:
            with translated(url):
                return system.info(name).get("size")
        except Gone:
            return None  # what fsspec's http says for a server that answers no HEAD

    def glob(self, pattern: str) -> list[str]:
        """URLs of what it names, sorted: objects and folders, or folders alone if it ends with a slash. UserError where
        the store cannot list.
        """
        if pattern.startswith(HTTP) or is_pipe(pattern):
            raise UserError(
                f"{pattern}: such a store cannot list its folders; name them with braces, {{000..007}}. "
                "In the last part of a URL, * works: the index.json in that folder knows the names"
            )
        system, name = self._system(pattern)
        parts = name.rstrip("/").split("/")
        fixed = next((k for k, part in enumerate(parts) if is_glob(part)), len(parts) - 1)
        found = {"/".join(parts[:fixed]) or "/"}
        for k, part in enumerate(parts[fixed:], fixed):  # fsspec's own glob omits what a sick store does not list
            folders = k + 1 < len(parts) or pattern.endswith("/")
            try:
                found = {each for folder in found for each in _within(system, folder, part, folders)}
            except Gone as gone:
                if k == fixed:
                    return []
                raise Sick(f"a folder is listed, but not what is in it ({gone})") from gone
        return sorted(map(system.unstrip_protocol, found))

    def _check_allowed(self, url: str) -> None:
        if not self.allow_pipe:
            raise UserError(f"{url}: it runs a shell command; set allow_pipe=true if that is what you want")
        _check_named(url)

    def _system(self, url: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """fsspec's file system, which it keeps (a forked process gets its own), and the object's name in it."""
        protocol = url.partition("://")[0]
        _check_named(f"{url} {self.storage_options}")
        try:
            options = options_of(protocol, self.timeout_seconds, self.storage_options)
            with translated(url):
                system, name = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            needed = f"pip install 'diffusion-trainer[{extra}]'" if extra else str(error)
            raise UserError(f"{url}: what opens {protocol}:// is not installed; {needed}") from error
        KEPT.add(system)
        return system, name


def _within(system: fsspec.AbstractFileSystem, folder: str, pattern: str, folders: bool) -> Iterator[str]:
    """What a folder has of such a name; Gone where there is no such folder."""
    with translated(system.unstrip_protocol(folder)):
        listed = system.ls(folder, detail=True)
    for entry in listed:
        path, fits = entry["name"].rstrip("/"), entry["type"] != "file" or not folders
        if fits and path != folder and matching([path.rpartition("/")[2]], pattern):
            yield path


def _check_named(text: str) -> None:
    """UserError if it has the name of a variable where its value should be: this environment has none."""
    if missing := re.search(r"\$\{oc\.env:(\w+)", text):
        raise UserError(f"export {missing[1]}=... first: the shards' URL, or data.store.storage_options, names it")


def read(remote: Remote, retries: Retries, url: str, parse: Callable[[bytes], Result]) -> Result:
    """A small object, parsed; Gone if it is not there, or the UserError of `parse`."""
    twice = Twice()

    def attempt() -> Result:
        try:
            data = remote.whole(url, MAX_SMALL)
        except Gone as gone:
            twice(Gone, str(gone))
            raise
        except TooMuch as much:
            twice(TooMuch, str(much))
            raise UserError(f"{url}: {much}, which no index has") from much
        try:
            return parse(data)
        except UserError as error:
            twice(data, str(error))
            raise

    return retries(url, attempt)


def globbed(remote: Remote, retries: Retries, pattern: str) -> list[str]:
    """What Remote.glob finds."""
    twice = Twice()

    def attempt() -> list[str]:
        found = remote.glob(pattern)
        if not found:  # some clients take a page of HTML for an empty listing
            twice(Gone, "it lists nothing of such a name")
        return found

    return retries(pattern, attempt)


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


def check_there(remote: Remote, retries: Retries, url: str, others: Sequence[str]) -> None:
    """NothingThere, if none of these is: an object is missing only from a store that has something else."""
    if not any(is_there(remote, retries, other) for other in others):
        raise NothingThere(
            f"neither {url} is there nor {' nor '.join(others) or 'anything else'}: is it the right store, and all of "
            f"it up? {AGAIN}"
        )


class _AtMost(Callback):
    """What fsspec tells of a transfer. An endless page must not fill the disk."""

    def __init__(self, at_most: int):
        super().__init__()
        self.at_most = at_most

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.at_most:
            raise TooMuch(f"more than {self.at_most} bytes came")
