"""Where the bytes of shards are."""

import errno
import fnmatch
import glob
import os
import resource
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.damage import MissingShard, Truncated
from diffusion_trainer.streaming.index import CHECKSUMS, INDEX, OFFSETS, SIZES, Shard, parse_index
from diffusion_trainer.streaming.retries import Retries, Sick
from diffusion_trainer.streaming.urls import expanded

MISTAKES = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)  # no waiting helps
RETRIES = Retries(10, 0.5)  # of what waiting may mend: two minutes, as a rule
MAX_OPEN = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)  # files of one process


class Store(ABC):
    """Reads pieces of shards. Each process has its own (forked ones share open files, which positional reads allow)."""

    steps_ahead: int = 0  # how early `prefetch` wants to know

    @abstractmethod
    def read(self, shard: Shard, offset: int, into: memoryview) -> None:
        """Fills `into` from byte `offset` on. Damage where the shard lacks these bytes; UserError where the storage
        does not answer."""

    def read_again(self, shard: Shard, offset: int, into: memoryview) -> None:
        """As `read`, once more from where the shard lies, if what was read may have been altered on the way."""
        return None

    @abstractmethod
    def sidecar(self, shard: Shard, suffix: str) -> bytes:
        """The index file beside the shard, `.idx` or `.crc`; UserError if there is none."""

    @abstractmethod
    def find(self, *patterns: str) -> list[Shard]:
        """The indexed shards that paths, globs (*) or brace patterns ({000..007}) name, in order.

        UserError if one names none, or one without index. A shard of the index that is not there is damage, found when
        it is read.
        """

    def prefetch(self, pieces: Iterable[tuple[Shard, int, int]]) -> None:
        """(shard, first byte, last byte) will be asked for soon; returns at once."""
        return None

    def prefetch_sidecars(self, shards: Iterable[Shard]) -> None:
        """As `prefetch`, of the index files beside them that say where samples lie."""
        return None


@dataclass
class LocalStore(Store):
    """Shards on disks of this machine, or on a file system that it shares, read in place."""

    _files: OrderedDict[str, int] = field(default_factory=OrderedDict, init=False, repr=False)

    def read(self, shard: Shard, offset: int, into: memoryview) -> None:
        try:
            self._read(shard, offset, into)
        except Sick:
            RETRIES(shard.url, lambda: self._read(shard, offset, into))

    def _read(self, shard: Shard, offset: int, into: memoryview) -> None:
        descriptor = self._files.get(shard.url)
        if descriptor is None:
            descriptor = self._open(shard)
        while into:  # nearly always once
            try:
                count = os.preadv(descriptor, [into], offset)
            except OSError as error:
                del self._files[shard.url]
                with suppress(OSError):  # of the same
                    os.close(descriptor)
                raise trouble(shard.url, error) from error  # a stale handle (ESTALE) is mended by opening again
            if count == 0:
                raise Truncated(f"it has {os.fstat(descriptor).st_size} bytes, its index says {shard.size}")
            if count == len(into):
                return
            into, offset = into[count:], offset + count

    def _open(self, shard: Shard) -> int:
        try:
            descriptor = os.open(shard.url, os.O_RDONLY)
        except FileNotFoundError as error:
            check_folder(shard.url)
            raise MissingShard("there is no such file") from error
        except OSError as error:
            raise trouble(shard.url, error) from error
        if os.fstat(descriptor).st_size > shard.size:
            os.close(descriptor)
            raise stale(shard)
        self._files[shard.url] = descriptor
        if len(self._files) > MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def find(self, *patterns: str) -> list[Shard]:
        listed = listing()
        return [shard for pattern in patterns for shard in self.named(pattern, listed)]

    def named(self, pattern: str, listed: "Listing") -> list[Shard]:
        """`find` of one pattern."""
        if "://" in pattern or pattern.startswith("pipe:"):
            raise UserError(
                f"shards: {pattern} is not a local path; use data=remote data.store.cache=<a folder on this node>"
            )
        names = expanded(pattern)

        def attempt() -> list[Shard]:
            try:
                return [shard for name in names for shard in _matching(name, listed)]
            except OSError as error:
                raise trouble(error.filename or pattern, error) from error

        return RETRIES(pattern, attempt)

    def sidecar(self, shard: Shard, suffix: str) -> bytes:
        return content(f"{shard.url}{suffix}", remedy(shard, suffix == SIZES))


def content(sidecar: str, how: str) -> bytes:
    """Of an index file; the error tells how to make it if it is missing."""

    def attempt() -> bytes:
        try:
            with open(sidecar, "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            check_folder(sidecar)
            raise UserError(f"{sidecar} is missing; make it: {how}") from error
        except OSError as error:
            raise trouble(sidecar, error) from error

    return RETRIES(sidecar, attempt)


class Folder:
    """What lies in a folder of shards and what its index has, listed once for any number of patterns.

    indexed: by name, the url being the path. No shard is looked at: a set may have a hundred thousand.
    """

    def __init__(self, path: Path):
        self.path, self.indexed = path, _indexed(path)
        self._names = set(os.listdir(path))

    @cached_property
    def new(self) -> set[str]:
        """What is there and not in the index."""
        names = self._names - self.indexed.keys()
        return {name for name in names if not name.endswith((OFFSETS, CHECKSUMS, SIZES))}


Listing = Callable[[str], list[Folder]]


def _indexed(path: Path) -> dict[str, Shard]:
    index, before = path / INDEX, str(path / "_")[:-1]
    listed = parse_index(index.read_bytes(), str(index), before) if index.is_file() else []
    return {shard.url[len(before) :]: shard for shard in listed}


def folders(path: Path) -> list[Folder]:
    """Those that a path or glob names, in order."""
    named = [path] if path.is_dir() else [Path(p) for p in glob.glob(str(path), recursive=True)]
    return [Folder(p) for p in sorted(named) if p.is_dir()]  # `**` names files, too


def listing() -> "Listing":
    """`folders`, each of which is looked at once: patterns may name a hundred thousand shards of one."""
    return cache(lambda folder: folders(Path(folder)))


def is_glob(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def matching(names: Collection[str], pattern: str) -> list[str]:
    """Those that a name or glob names, in order."""
    if is_glob(pattern):
        return sorted(fnmatch.filter(names, pattern))
    return [pattern] if pattern in names else []


def _matching(pattern: str, listed: Listing) -> list[Shard]:
    before, slash, last = pattern.rpartition("/")
    found: list[Shard] = []
    for folder in listed(before + slash):
        names = matching(folder.indexed, last)
        new = [] if names == [last] else matching(folder.new, last)
        if new:
            _check_names_files(Path(pattern))
            raise UserError(
                f"shards: {folder.path / new[0]} has no index; make it: diffusion-trainer index '{Path(pattern)}'"
            )
        found += [folder.indexed[name] for name in names]
    if not found:
        path = Path(pattern)
        _check_names_files(path)
        raise UserError(
            f"shards: no file matches {path} (looked in {path.absolute().parent}). "
            "Write them first (for the digits: python data/digits.py) or say where they are: data.shards=..."
        )
    return found


def _check_names_files(path: Path) -> None:
    """UserError where something else was meant to name the shards in a folder."""
    if path.is_dir():
        raise UserError(f"shards: {path} is a folder; name its files: {path}/*.tar")
    if path.name == INDEX:
        raise UserError(f"shards: {path} is their index; name the files: {path.parent}/*.tar")


def check_folder(path: str) -> None:
    """Sick, if the index that names the file is gone, too: then its file system is."""
    if not os.path.exists(os.path.join(os.path.dirname(path), INDEX)):
        raise Sick(f"{INDEX} beside it is gone, too: is its file system there?")


def trouble(path: str, error: OSError) -> Exception:
    """What to raise for an error of the file system."""
    if error.errno in MISTAKES:
        return UserError(f"shards: {path} cannot be read ({error.strerror}): check its name and permissions")
    return Sick(f"{error.strerror}: is its file system there?")


def remedy(shard: Shard, image_sizes: bool = False) -> str:
    """The command that makes the index of a shard anew, with all that it has, or is to have."""
    sizes = " image_sizes=true" if image_sizes or shard.sizes is not None else ""
    return f"diffusion-trainer index '{shard.url}' again=true{sizes}"


class Stale(UserError):
    """A shard is not what its index describes."""


def stale(shard: Shard) -> Stale:
    return Stale(
        f"shard {shard.url} is not what its index describes: it was written again. Make the index anew "
        f"({remedy(shard)}); that changes the order of samples, so start a new run folder"
    )
