"""How a checkpoint is written: a copy in memory, from which a thread of its own writes while training goes on.

A folder is made under a name that no reader looks at, and is renamed, once, to a name that nothing has: so at every
instant there is a whole checkpoint, that before or this one.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any

import diffusion_trainer
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import FORMAT, Written, sync, write_manifest, write_tensors, write_text
from diffusion_trainer.training.sharding import Sharding
from diffusion_trainer.training.snapshots import Snapshot, Snapshots

LATEST = "latest"
LIBRARIES = ("torch", "lightning", "deepspeed")  # whose versions a manifest has
NAME = re.compile(r"images-(\d{12,})(?:-(\d{1,6}))?")  # the second number is that of a name that was taken


class NotRemoved(OSError):
    """A checkpoint is written, but older ones are still there."""


class Saver:
    """Saves in the background, one at a time. Its thread agrees with those of the other ranks over a group of its own:
    the collectives of two threads on one group would meet those of the other thread.
    """

    def __init__(
        self,
        root: Path,
        sharding: Sharding,
        agreement: Agreement,
        keep: int,
        keeps: Callable[[str], bool] = lambda kind: True,
        reach: int = 0,
    ):
        """keep, reach: of `write`; keeps: which kinds of tensors."""
        self.root, self.agreement, self.keep, self.reach = root, agreement, keep, reach
        self.seconds = 0.0  # that the last save took, from its copy to the end
        self.snapshots = Snapshots(sharding, agreement.rank, keeps)
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def reserve(self) -> None:
        """Makes room for the first snapshot. For after the first step: before, the optimizer has no state."""
        runs = self.snapshots.missing()
        self._start(lambda: self.snapshots.reserve(runs))

    def begin(self, images_seen: int, state: Mapping[str, Any]) -> None:
        """Returns once what is to be saved is copied. All ranks must call it, and `wait` before it."""
        began = monotonic()
        snapshot = self.snapshots.take(images_seen, state)

        def save() -> None:
            try:
                write(self.root, snapshot, self.agreement, self.keep, self.reach)
            finally:
                self.seconds = monotonic() - began

        self._start(save)

    def _start(self, work: Callable[[], Any]) -> None:
        if self._thread is not None:
            raise RuntimeError("the save before has not been waited for")

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 (`wait` raises it)
                self._error = error

        self._thread = Thread(target=run, name="checkpoint")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether `wait` will raise, as far as is known now."""
        return self._error is not None

    def wait(self) -> None:
        """Until nothing is being saved. Raises what went wrong, once: an OSError is the same on all ranks."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error


def write(root: Path, snapshot: Snapshot, agreement: Agreement, keep: int, reach: int = 0) -> Path:
    """Writes <root>/images-<images_seen>, moves `latest` to it, then deletes all but the newest `keep` up to it, and
    one or two before those where they do not go back by `reach` images.

    All ranks must call it. OSError, on all ranks, if any of them could not write; what was there before is intact then.
    NotRemoved, on all ranks, if only the last part failed.
    """
    first = agreement.rank == 0
    folder = root / f"images-{snapshot.images_seen:012d}"  # until rank 0 has looked whether that is taken

    def prepare() -> str | None:
        return _make_room(root, folder.name) if first else None

    def fill() -> tuple[str, Written] | None:
        if snapshot.tensors is None:
            return None
        name = f"rank-{agreement.rank:05d}.safetensors"
        return name, write_tensors(_part(folder) / name, snapshot.tensors)

    def publish() -> None:
        if first:
            write_manifest(_part(folder), _manifest(snapshot, dict(filter(None, files)), agreement.world))
            sync(_part(folder))
            _part(folder).rename(folder)
            sync(root)
            write_text(root / LATEST, folder.name)

    try:
        folder = root / _together(prepare, agreement)[0]
        files = _together(fill, agreement)
        _together(publish, agreement)
    except OSError as error:
        if first:
            shutil.rmtree(_part(folder), ignore_errors=True)
        raise OSError(f"checkpoint {folder} could not be written: {error}; the one before it is intact") from error
    try:
        _together(lambda: _retain(root, folder, keep, reach) if first else None, agreement)
    except OSError as error:
        raise NotRemoved(f"checkpoint {folder} is written, but older ones could not be removed: {error}") from error
    return folder


def _part(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _make_room(root: Path, name: str) -> str:
    """An empty folder to write in; the name that it is to get, which is never one that is taken.

    To put a folder in another's place takes two steps, and between them there would be none.
    """
    root.mkdir(parents=True, exist_ok=True)
    sync(root.parent)
    for left in root.glob(".images-*"):  # by a process that was killed, or of an old one that could not be removed
        shutil.rmtree(left, ignore_errors=True)  # if it is in the way, `mkdir` says so
    taken = [order_of(p)[1] for p in folders(root) if order_of(p)[0] == order_of(root / name)[0]]
    free = f"{name}-{max(taken) + 1}" if taken else name
    _part(root / free).mkdir()
    return free


def _together(action: Callable[[], Any], agreement: Agreement) -> list[Any]:
    """What each rank's action returned, by rank; if it failed on one, OSError or RuntimeError on all ranks."""
    result, error = None, None
    try:
        result = action()
    except Exception as problem:  # noqa: BLE001 (all ranks raise it: the others would wait for this one)
        error = problem
    outcomes = agreement.gather((result, str(error) if error else None, isinstance(error, OSError)))
    failed = [(text, of_the_disk) for _, text, of_the_disk in outcomes if text is not None]
    if failed:
        text, of_the_disk = failed[0]
        raise (OSError if of_the_disk else RuntimeError)(text) from error
    return [result for result, *_ in outcomes]


def _manifest(snapshot: Snapshot, files: Mapping[str, Written], world: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "images_seen": snapshot.images_seen,
        "optimizer_steps": snapshot.optimizer_steps,
        "parameters": snapshot.shapes,
        "files": {name: written._asdict() for name, written in sorted(files.items())},
        "state": snapshot.state,
        "written_by": {
            "diffusion_trainer": diffusion_trainer.__version__,
            **{library: metadata.version(library) for library in LIBRARIES},
            "strategy": snapshot.strategy,
            "ranks": world,
        },
    }


def order_of(folder: Path) -> tuple[int, int] | None:
    """Images seen, and how often that had been saved before; None if it is no checkpoint's name."""
    found = NAME.fullmatch(folder.name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def folders(root: Path) -> list[Path]:
    """Those with a checkpoint's name, the newest last."""
    return sorted((p for p in root.glob("images-*") if order_of(p)), key=order_of)


def _retain(root: Path, newest: Path, keep: int, reach: int) -> None:
    """Deletes checkpoints up to `newest` but those to keep, and what was saved twice."""
    before = [p for p in folders(root) if order_of(p) <= order_of(newest)]
    last = {order_of(p)[0]: p for p in before}  # of each number of images
    for old in set(before) - {last[images] for images in kept(list(last), keep, reach)}:
        hidden = root / f".{old.name}.old"  # at once: a folder that is half deleted would be a damaged checkpoint
        old.rename(hidden)
        shutil.rmtree(hidden)


def kept(saved: Sequence[int], keep: int, reach: int) -> set[int]:
    """Of checkpoints of so many images, ascending: the last `keep`, the last one that is `reach` before the newest, and
    the one after that, which takes its place when it is old enough (or there would never be another of that age).
    """
    old = [i for i, images in enumerate(saved) if images <= saved[-1] - reach]
    return {*saved[-keep:], *(saved[old[-1] : old[-1] + 2] if old else saved[:1])}
