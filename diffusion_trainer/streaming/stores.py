"""Where the bytes of shards are."""

import errno
import fnmatch
import glob
import os
import resource
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.damage import MissingShard, Truncated
from diffusion_trainer.streaming.index import CHECKSUMS, INDEX, OFFSETS, SIZES, Shard, parse_index
from diffusion_trainer.streaming.retries import AGAIN
from diffusion_trainer.streaming.urls import expanded

MISTAKES = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # waiting mends none of them
MAX_OPEN = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)  # files of one process


class Store(ABC):
    """Reads pieces of shards. Each process has its own (forked ones share open files, which positional reads allow)."""

    steps_ahead: int = 0  # how early `ahead` wants to know

    @abstractmethod
    def read(self, shard: Shard, offset: int, into: memoryview) -> None:
        """Fills `into` from byte `offset` on. Damage where the shard lacks these bytes; UserError where the storage
        does not answer."""

    @abstractmethod
    def sidecar(self, shard: Shard, suffix: str) -> bytes:
        """The index file beside the shard, `.idx` or `.crc`; UserError if there is none."""

    @abstractmethod
    def find(self, *patterns: str) -> list[Shard]:
        """The indexed shards that paths, globs (*) or brace patterns ({000..007}) name, in order.

        UserError if one names none, or one without index. A shard of the index that is not there is damage, found when
        it is read.
        """

    def ahead(self, pieces: Iterable[tuple[Shard, int, int]]) -> None:
        """(shard, first byte, last byte) will be asked for soon; returns at once."""
        return None


@dataclass
class LocalStore(Store):
    """Shards on disks of this machine, or on a file system that it shares, read in place."""

    _files: OrderedDict[str, int] = field(default_factory=OrderedDict, init=False, repr=False)

    def read(self, shard: Shard, offset: int, into: memoryview) -> None:
        descriptor = self._files.get(shard.url)
        if descriptor is None:
            descriptor = self._open(shard)
        while into:  # nearly always once
            try:
                count = os.preadv(descriptor, [into], offset)
            except OSError as error:
                raise ill(shard.url, error) from error
            if count == 0:
                raise Truncated(f"it has {os.fstat(descriptor).st_size} bytes, its index says {shard.size}")
            if count == len(into):
                return
            into, offset = into[count:], offset + count

    def _open(self, shard: Shard) -> int:
        try:
            descriptor = os.open(shard.url, os.O_RDONLY)
        except FileNotFoundError as error:
            raise MissingShard("there is no such file") from error
        except OSError as error:
            raise ill(shard.url, error) from error
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
        try:
            return [shard for name in names for shard in _matching(name, listed)]
        except OSError as error:
            if error.errno in MISTAKES:
                raise UserError(
                    f"shards: {error.filename or pattern} cannot be read ({error.strerror}): check its name and "
                    "permissions"
                ) from error
            raise ill(error.filename or pattern, error) from error

    def sidecar(self, shard: Shard, suffix: str) -> bytes:
        try:
            with open(f"{shard.url}{suffix}", "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            raise UserError(
                f"{shard.url}{suffix} is missing; make it: diffusion-trainer index '{shard.url}' again=true"
                + (" image_sizes=true" if suffix == SIZES else "")
            ) from error
        except OSError as error:
            raise ill(f"{shard.url}{suffix}", error) from error


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


def ill(path: str, error: OSError) -> PassingError:
    return PassingError(f"{path} cannot be read ({error.strerror}): is its file system there? {AGAIN}")


def stale(shard: Shard) -> UserError:
    return UserError(
        f"shard {shard.url} is not what its index describes: it was written again. Make the index anew "
        f"(diffusion-trainer index '{shard.url}'); that changes the order of samples, so start a new run folder"
    )
