"""Where a shard lies whose index is to be made: a disk, or a store that fsspec opens."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.index import INDEX, MAX_SHARD, Shard, locked, parse_index, serialized
from diffusion_trainer.streaming.locks import remove_left, replace_file
from diffusion_trainer.streaming.remote import Gone, Remote, read
from diffusion_trainer.streaming.retries import Retries, Sick
from diffusion_trainer.streaming.urls import located


class Site(ABC):
    """One shard; its index files stand beside it."""

    name: str
    folder: str

    @abstractmethod
    def beside(self, name: str) -> bytes | None:
        """A file in its folder; None if it is not there."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Writes one whole, or not at all."""

    @abstractmethod
    def size(self) -> int | None:
        """Of the shard; None where nobody tells."""

    @abstractmethod
    def has(self, name: str) -> bool: ...

    @abstractmethod
    def local(self) -> Iterator[Path]:
        """A context in which the shard is a file of this machine."""

    def listed(self) -> list[Shard]:
        """What its folder's index holds; UserError for one that is none."""
        data = self.beside(INDEX)
        return parse_index(data, f"{self.folder}{INDEX}") if data is not None else []

    def remove(self, name: str) -> None:
        """An index file of before, where one may; elsewhere it stays, and the index does not speak of it."""
        return None

    def begin_anew(self) -> None:
        """Takes out of its folder's index what is there no more, and empties one that is none."""
        with self.alone():
            try:
                gone = self.gone()
            except UserError:
                return self.put(INDEX, serialized([]))
            if gone:
                self._list([], without=gone)
        return None

    def alone(self) -> AbstractContextManager:
        """While it lasts no other process changes its folder's index, where files can be locked."""
        return nullcontext()

    def list(self, shards: Sequence[Shard], without: Container[str]) -> None:
        """Adds shards to its folder's index and takes others out."""
        with self.alone():
            self._list(shards, without)

    def _list(self, shards: Sequence[Shard], without: Container[str]) -> None:
        every = {shard.url: shard for shard in (*self.listed(), *shards) if shard.url not in without}
        if every or self.has(INDEX):
            self.put(INDEX, serialized(every.values()))

    def clean(self) -> None:
        """Removes from its folder what was being written by processes that were killed."""
        return None

    def gone(self) -> set[str]:
        """Of the shards that its folder's index lists, those that are there no more, where that is cheap to tell."""
        return set()

    def is_indexed(self, size: int, suffixes: Sequence[str]) -> bool:
        """Whether it has the size that the index says, and all files beside it."""
        return self.size() in (size, None) and all(self.has(f"{self.name}{suffix}") for suffix in suffixes)

    def __str__(self) -> str:
        return f"{self.folder}{self.name}"


@dataclass(frozen=True)
class LocalSite(Site):
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def folder(self) -> str:
        return f"{self.path.parent}/"

    def beside(self, name: str) -> bytes | None:
        path = self.path.with_name(name)
        return path.read_bytes() if path.is_file() else None

    def put(self, name: str, data: bytes) -> None:
        replace_file(self.path.with_name(name), data)

    def remove(self, name: str) -> None:
        self.path.with_name(name).unlink(missing_ok=True)

    def clean(self) -> None:
        remove_left(self.path.parent)

    def size(self) -> int:
        return self.path.stat().st_size

    def has(self, name: str) -> bool:
        return self.path.with_name(name).is_file()

    def alone(self) -> AbstractContextManager:
        return locked(self.path.parent)

    def gone(self) -> set[str]:
        return {shard.url for shard in self.listed() if not self.has(shard.url)}

    @contextmanager
    def local(self) -> Iterator[Path]:
        yield self.path


@dataclass(frozen=True)
class RemoteSite(Site):
    """out: a local folder for the index files, of a store that cannot be written to."""

    url: str
    remote: Remote
    retries: Retries
    out: Path | None = None

    @property
    def name(self) -> str:
        return located(self.url).name

    @property
    def folder(self) -> str:
        return located(self.url).folder

    def beside(self, name: str) -> bytes | None:
        if self.out is not None:
            return LocalSite(self.out / self.name).beside(name)
        try:
            return read(self.remote, self.retries, located(self.url).beside(name), bytes)
        except Gone:
            return None

    def put(self, name: str, data: bytes) -> None:
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            return replace_file(self.out / name, data)
        url = located(self.url).beside(name)
        try:
            self.retries(url, lambda: self.remote.put(url, data))
        except PassingError:
            raise
        except (UserError, Gone, OSError, NotImplementedError) as error:
            raise UserError(
                f"{url} cannot be written ({type(error).__name__}: {error}); write the index to a folder, out=..., and "
                "train with data.store.index=... that folder, or copy its files to where the shards are"
            ) from error

    def remove(self, name: str) -> None:
        if self.out is not None:
            LocalSite(self.out / self.name).remove(name)

    def alone(self) -> AbstractContextManager:
        if self.out is None:
            return super().alone()
        self.out.mkdir(parents=True, exist_ok=True)
        return LocalSite(self.out / self.name).alone()

    def clean(self) -> None:
        if self.out is not None:
            LocalSite(self.out / self.name).clean()

    def size(self) -> int | None:
        return self.retries(self.url, lambda: self.remote.size(self.url))

    def has(self, name: str) -> bool:
        if self.out is not None:
            return (self.out / name).is_file()
        url = located(self.url).beside(name)
        return self.retries(url, lambda: self.remote.size(url)) is not None

    @contextmanager
    def local(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="index-") as folder:
            path = Path(folder) / "shard.tar"
            self.retries(self.url, lambda: self._fetch(path))
            yield path

    def _fetch(self, path: Path) -> None:
        """Half of a shard, or a proxy's page, would be indexed as a damaged one."""
        self.remote.get(self.url, path, MAX_SHARD)
        size, came = self.remote.size(self.url), path.stat().st_size
        if size and size != came:  # some servers say 0 of what they stream
            raise Sick(f"{came} bytes came where the object has {size}")
