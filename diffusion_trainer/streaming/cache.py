"""A bounded folder of fetched files that the processes of a node share.

    entries/<name>          complete; its time of modification is that of its last use
    fetching/<name>.part    being written; renamed when it is complete
    fetching/<name>.lock    locked by who fetches, while they live. Its size (a sparse file) is the room they have taken
    accounts                bytes of all entries and of the room taken; whoever changes it holds its lock

A process may be killed anywhere: its locks go with it, and what it left of a file is removed by the next one.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.answers import FULL
from diffusion_trainer.streaming.locks import locked

AT_ONCE = 16  # a full cache loses at least a sixteenth: who keeps a million small pieces does not list them for each
FULL_TRIES = 20
POLL_SECONDS = 0.02
AHEAD_NS = 60 * 10**9  # a clock may be that wrong
RELEASE_SECONDS = 2.0  # twice what a reader takes to close files of removed entries (files.py)

Fetch = Callable[[Path], None]  # fills a file


class Cache:
    """Files by name, at most `limit` bytes of them, the longest unused removed first.

    An entry's file that somebody has open can be read on when it is removed.

    wait: whether to wait for what others fetch, and to remove entries from a disk that is full. release: called
    while it waits, to close files of removed entries.
    """

    def __init__(self, folder: Path, limit: int, wait: bool = True, release: Callable[[], None] = lambda: None):
        self.folder, self.limit, self.wait, self.release = folder, limit, wait, release
        self.entries, self.fetching = folder / "entries", folder / "fetching"
        with self._explained():
            self._make_folders()
            with self._accounts() as accounts:
                self._taken(accounts)  # removes what killed processes left

    def open(self, name: str, size: int, fetch: Fetch) -> int | None:
        """A descriptor of the entry, fetched by this process unless it is there or another one fetches it meanwhile.

        size: bytes that `fetch` will write; if it writes fewer, they are the entry. UserError if it can never fit, or
        the disk stays full. If this cache does not wait: None if another process is at it, or all room is taken.
        """
        if size > self.limit:
            raise UserError(f"a file of {size} bytes does not fit into the cache: cache_bytes={self.limit}")
        with self._explained():
            while True:
                descriptor = self._entry(name)
                if descriptor is None:
                    with self._claimed(name) as claim:
                        descriptor = self._entry(name)
                        if claim is not None and descriptor is None:
                            descriptor = self._filled(name, size, claim, fetch)
                if descriptor is not None or not self.wait:
                    return descriptor
                self.release()  # who fetches may need the space
                time.sleep(POLL_SECONDS)

    def _entry(self, name: str) -> int | None:
        try:
            descriptor = os.open(self.entries / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        touch(descriptor)
        return descriptor

    @contextmanager
    def _claimed(self, name: str) -> Iterator[int | None]:
        """The right to fetch the entry: its lock; None if another has it."""
        self._make_folders()  # a cache may be emptied while runs go on
        path = self.fetching / f"{name}.lock"
        with locked(path, wait=False) as lock:
            if lock is None or os.fstat(lock).st_nlink == 0:  # removed by its holder, who was done just then
                yield None
                return
            try:
                yield lock
            finally:
                path.unlink(missing_ok=True)

    def _filled(self, name: str, size: int, claim: int, fetch: Fetch) -> int | None:
        if not self._reserve(name, claim, size):
            return None
        part, descriptor, kept = self.fetching / f"{name}.part", None, 0
        try:
            descriptor = self._written(part, size, fetch)
            return descriptor
        finally:
            with self._accounts() as accounts:  # at once for those who count: what was taken is now an entry, or free
                if descriptor is None:
                    part.unlink(missing_ok=True)
                else:
                    kept = os.fstat(descriptor).st_size
                    part.replace(self.entries / name)
                os.ftruncate(claim, 0)
                _add(accounts, kept - size)

    def _written(self, part: Path, size: int, fetch: Fetch) -> int:
        """Its descriptor. Removes entries while the disk is full."""
        for tries in count(1):
            part.unlink(missing_ok=True)
            try:
                fetch(part)
                descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                os.fsync(descriptor)  # else a node that loses power may keep the name without the data
                return descriptor
            except OSError as error:
                if error.errno not in FULL or not self.wait:
                    raise
                part.unlink(missing_ok=True)
                if not self._make_room(size) or tries == FULL_TRIES:
                    raise UserError(
                        f"the disk of the cache {self.folder} is full: {size} bytes are needed, {self._free()} are "
                        "free. Make room, or choose another cache"
                    ) from error

    def _reserve(self, name: str, claim: int, size: int) -> bool:
        """Takes room, removing entries for it; False if what others fetch takes all of it."""
        with self._accounts() as accounts:
            self._forget(accounts, name, claim)
            used, taken = _read(accounts), 0
            if used is None or used + size > self.limit:
                taken = sum(self._taken(accounts).values())
                used = self._evict(self.limit - size, self.limit - self.limit // AT_ONCE, taken)
            if taken + size > self.limit:
                return False
            os.ftruncate(claim, size)
            _write(accounts, used + size)
            return True

    def _evict(self, most: int, goal: int, taken: int) -> int:
        """Counts the entries and what is taken. If that is more than `most`, removes entries, those first that were
        not used for longest, until it is neither more than that nor than the goal. Returns what is left.

        (The accounts are held.) Removes none if what is taken is too much already."""
        known = sorted(_listed(self.entries))
        used = sum(size for _, size, _ in known) + taken
        if used <= most or taken > most:
            return used
        for _, size, path in known:
            if used <= min(most, goal):
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _make_room(self, size: int) -> bool:
        """On a full disk: whether anything was removed, or others are fetching what can be removed then."""
        with self._accounts() as accounts:
            taken = self._taken(accounts)
            used = sum(taken.values())
            before = sum(found for _, found, _ in _listed(self.entries)) + used
            goal = max(used, before - size)
            left = self._evict(goal, goal, used)
            _write(accounts, left)
        self.release()
        deadline = time.monotonic() + RELEASE_SECONDS  # others close the files of removed entries soon
        while (left < before or len(taken) > 1) and self._free() < size and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return left < before or len(taken) > 1

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _taken(self, accounts: int) -> dict[Path, int]:
        """Locks of those who fetch, and the room they have taken. Removes what the dead left. (The accounts are held:
        nobody begins a part meanwhile.)"""
        taken = {}
        parts = set(self.fetching.glob("*.part"))
        for path in self.fetching.glob("*.lock"):
            with suppress(FileNotFoundError), locked(path, wait=False, create=False) as lock:
                if lock is not None:
                    if os.fstat(lock).st_nlink:  # else the name is another's by now
                        self._forget(accounts, path.stem, lock)
                        path.unlink()
                    continue
                parts.discard(path.with_suffix(".part"))
                size = path.stat().st_size
                if size:
                    taken[path] = size
        for part in parts:
            part.unlink(missing_ok=True)
        return taken

    def _forget(self, accounts: int, name: str, claim: int) -> None:
        """Frees the room that a process took which died; not if it lived to see its entry complete, which counts."""
        size = os.fstat(claim).st_size
        os.ftruncate(claim, 0)
        if not (self.entries / name).exists():
            _add(accounts, -size)

    @contextmanager
    def _accounts(self) -> Iterator[int]:
        with locked(self.folder / "accounts") as accounts:
            yield accounts

    def _make_folders(self) -> None:
        for folder in (self.entries, self.fetching):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"the cache {self.folder} cannot be used: {error}") from error


def _read(accounts: int) -> int | None:
    """Bytes in use; None if nobody has counted."""
    digits = os.pread(accounts, 20, 0)
    return int(digits) if digits.isdigit() else None


def _write(accounts: int, used: int) -> None:
    os.pwrite(accounts, b"%020d" % used, 0)


def _add(accounts: int, change: int) -> None:
    used = _read(accounts)
    if used is not None:
        _write(accounts, max(0, used + change))


def _listed(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Last use, bytes and path of each file. What a wrong clock dated in the future comes first, or it would stay."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                found = entry.stat()
                last = found.st_mtime_ns
                yield last if last < time.time_ns() + AHEAD_NS else 0, found.st_size, Path(entry.path)


def touch(descriptor: int) -> None:
    """Marks an entry as used now."""
    now = time.time_ns()  # left to the kernel it is a clock of some milliseconds
    os.utime(descriptor, ns=(now, now))
