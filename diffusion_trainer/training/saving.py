"""How a checkpoint is written: a copy in memory, from which a thread of its own writes while training goes on.

A folder is made under a name that no reader looks at, and is renamed, once, to a name that nothing has: so at every
instant there is a whole checkpoint, that before or this one.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import lightning
import torch
from torch import Tensor

from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import FORMAT, Written, sync, write_manifest, write_tensors, write_text
from diffusion_trainer.training.sharding import Sharding

WEIGHT = "weight"
LATEST = "latest"
NAME = re.compile(r"images-(\d{12,})(?:-(\d{1,6}))?")  # the second number is that of a name that was taken


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, as it was at one step."""

    images_seen: int
    optimizer_steps: float
    shapes: dict[str, list[int]]
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None  # CPU; None where another rank writes what this one holds too


class Snapshots:
    """Copies of a rank's weights and optimizer state, or of those kinds that `keeps`, in memory kept for the next.

    Copying to pages that are there takes a tenth of the time of copying to new ones.
    """

    def __init__(self, sharding: Sharding, rank: int, keeps: Callable[[str], bool] = lambda kind: True):
        self.sharding, self.holds, self.keeps = sharding, rank == 0 or not sharding.replicated, keeps
        self._buffers: dict[str, Tensor] = {}

    def missing(self) -> dict[str, Tensor]:
        """What the next snapshot has no memory for yet."""
        return {key: run for key, run in self._runs() if key not in self._buffers}

    def reserve(self, runs: Mapping[str, Tensor]) -> None:
        for key, run in runs.items():  # pinned: a copy from a GPU goes past the processor then
            self._buffers[key] = torch.empty(run.shape, dtype=run.dtype, pin_memory=run.is_cuda).zero_()

    @torch.no_grad()
    def take(self, images_seen: int, state: Mapping[str, Any]) -> Snapshot:
        """Overwrites the snapshot before. ValueError or TypeError if `state` is not JSON."""
        self.reserve(self.missing())
        runs = dict(self._runs())
        for key, run in runs.items():
            self._buffers[key].copy_(run, non_blocking=True)
        if any(run.is_cuda for run in runs.values()):
            torch.cuda.synchronize()
        tensors = {key: self._buffers[key] for key in runs} if self.holds else None
        shapes = {name: list(shape) for name, shape in shapes_of(self.sharding).items()}
        return Snapshot(images_seen, self._steps(), shapes, json.loads(json.dumps(state)), tensors)

    def _steps(self) -> float:
        state = self.sharding.optimizer.state
        return max({float(state[m]["step"]) for m in self.sharding.masters() if m in state}, default=0.0)

    def _runs(self) -> Iterator[tuple[str, Tensor]]:
        for slot in self.sharding.slots() if self.holds else ():
            state = self.sharding.optimizer.state.get(slot.master, {})
            kinds = {WEIGHT: slot.master} | {k: v for k, v in state.items() if torch.is_tensor(v) and v.dim()}
            for kind, tensor in kinds.items():
                if not self.keeps(kind):
                    continue
                run = tensor.detach().reshape(-1)[slot.at : slot.at + slot.count]
                yield f"{kind}/{slot.name}/{slot.first}", run


def shapes_of(sharding: Sharding) -> dict[str, torch.Size]:
    return {name: getattr(p, "ds_shape", p.shape) for name, p in sharding.model.named_parameters() if p.requires_grad}


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
    ):
        """keep: how many checkpoints; keeps: which kinds of tensors."""
        self.root, self.agreement, self.keep = root, agreement, keep
        self.snapshots = Snapshots(sharding, agreement.rank, keeps)
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def reserve(self) -> None:
        """Makes room for the first snapshot. For after the first step: before, the optimizer has no state."""
        runs = self.snapshots.missing()
        self._start(lambda: self.snapshots.reserve(runs))

    def begin(self, images_seen: int, state: Mapping[str, Any]) -> None:
        """Returns once what is to be saved is copied. All ranks must call it, and `wait` before it."""
        snapshot = self.snapshots.take(images_seen, state)
        self._start(lambda: write(self.root, snapshot, self.agreement, self.keep))

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


def write(root: Path, snapshot: Snapshot, agreement: Agreement, keep: int) -> Path:
    """Writes <root>/images-<images_seen>, moves `latest` to it, then deletes all but the newest `keep` up to it.

    All ranks must call it. OSError, on all ranks, if any of them could not write; what was there before is intact then.
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
        _together(lambda: _retain(root, folder, keep) if first else None, agreement)
    except OSError as error:
        raise OSError(f"checkpoint {folder} is written, but older ones could not be removed: {error}") from error
    return folder


def _part(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _make_room(root: Path, name: str) -> str:
    """An empty folder to write in; the name that it is to get, which is never one that is taken.

    To put a folder in another's place takes two steps, and between them there would be none.
    """
    root.mkdir(parents=True, exist_ok=True)
    sync(root.parent)
    for left in root.glob(".images-*"):  # by a process that was killed
        shutil.rmtree(left)
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
        "written_by": {"world": world, "torch": torch.__version__, "lightning": lightning.__version__},
    }


def order_of(folder: Path) -> tuple[int, int] | None:
    """Images seen, and how often that had been saved before; None if it is no checkpoint's name."""
    found = NAME.fullmatch(folder.name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def folders(root: Path) -> list[Path]:
    """Those with a checkpoint's name, the newest last."""
    return sorted((p for p in root.glob("images-*") if order_of(p)), key=order_of)


def _retain(root: Path, newest: Path, keep: int) -> None:
    """Deletes checkpoints up to `newest` but the last `keep` numbers of images, and what was saved twice."""
    before = [p for p in folders(root) if order_of(p) <= order_of(newest)]
    last = {order_of(p)[0]: p for p in before}  # of each number of images
    for old in set(before) - set(list(last.values())[-keep:]):
        hidden = root / f".{old.name}.old"  # at once: a folder that is half deleted would be a damaged checkpoint
        old.rename(hidden)
        shutil.rmtree(hidden)
