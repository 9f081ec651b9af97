"""Checkpoints: a folder that appears complete or not at all, in tensors and JSON (no file of it can run code).

    <run>/checkpoints/images-000102400/
        rank-00000.safetensors   this rank's runs of weight, ema, exp_avg, exp_avg_sq: "<kind>/<parameter>/<first>"
        manifest.json            progress, shapes, sizes and checksums of the files, what wrote it; written last
    <run>/checkpoints/latest     the name of the newest, replaced after the folder is in its place

Runs of elements are named by parameter and first element, so any world size and strategy reads what any other wrote.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training import saving
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import (
    MANIFEST,
    DamagedCheckpoint,
    read_back,
    read_manifest,
    unreadable,
)
from diffusion_trainer.training.saving import LATEST, folders, order_of
from diffusion_trainer.training.sharding import Sharding
from diffusion_trainer.training.snapshots import WEIGHT, Snapshots, shapes_of


def save(root: Path, images_seen: int, sharding: Sharding, state: Mapping, agreement: Agreement, keep: int) -> Path:
    """Writes <root>/images-<images_seen>, moves `latest` to it, then deletes all but the newest `keep` up to it.

    state: what else to resume, JSON. All ranks must call it. OSError, on all ranks, if any of them could not write;
    what was there before is intact then. (`saving.Saver` does the same in the background.)
    """
    return saving.write(root, Snapshots(sharding, agreement.rank).take(images_seen, state), agreement, keep)


def latest(root: Path) -> Path | None:
    """The newest checkpoint under <run>/checkpoints, None if there is none yet. Reading shows whether it is whole."""
    named = named_by_latest(root)
    if named is not None and (named / MANIFEST).is_file():
        return named
    there = [p for p in folders(root) if (p / MANIFEST).is_file()]
    return there[-1] if there else None


def named_by_latest(root: Path) -> Path | None:
    """What the file `latest` names, if that is a checkpoint's name."""
    path = root / LATEST
    named = root / path.read_text(errors="replace").strip() if path.is_file() else None
    return named if named and named.parent == root and order_of(named) else None


class Checkpoint:
    """A checkpoint folder, opened for reading; only the elements asked for are read from its files, after the checksum
    of the whole file, once.
    """

    def __init__(self, folder: Path, whole: Collection[str] = (WEIGHT,)):
        """DamagedCheckpoint, a UserError, if it is not one, a file of it is missing or has another size, or it does not
        hold all of the kinds `whole`.
        """
        self.folder, self._whole = folder, whole
        self.manifest: dict[str, Any] = read_manifest(folder)
        self.files = self.manifest["files"]
        self.verified: set[str] = set()  # files whose checksum was right
        self.shapes = {name: torch.Size(shape) for name, shape in self.manifest["parameters"].items()}
        self._runs = defaultdict(list)  # (kind, parameter) -> [(first, count, open file, its name, key)]
        for name in self.files:
            try:
                self._open(name)
            except (OSError, MemoryError, RuntimeError) as error:  # a RuntimeError: it could not be mapped into memory
                raise unreadable(folder / name, error) from error
            except (SafetensorError, ValueError) as error:
                raise self._damaged(name, str(error)) from error
        self._check_complete()

    def _check_complete(self) -> None:
        problem = next(self._gaps(), None)
        if problem:
            self.verify(self.files)  # names the file, if it is one that is damaged
            raise self._damaged(MANIFEST, problem)

    def _gaps(self) -> Iterator[str]:
        for name, shape in self.shapes.items():
            missing = [kind for kind in self._whole if shape.numel() and (kind, name) not in self._runs]
            if missing:
                yield f"none of its files holds {missing[0]} of {name}"
        for (kind, name), runs in self._runs.items():
            runs.sort(key=lambda run: run[0])
            ends = [first + count for first, count, *_ in runs]
            if [first for first, *_ in runs] != [0, *ends[:-1]] or ends[-1] != self.shapes[name].numel():
                yield f"{kind} of {name} has gaps in its files, or is there twice"

    def _open(self, name: str) -> None:
        path, size = self.folder / name, self.files[name].size
        if path.stat().st_size != size:
            raise ValueError(f"it has {path.stat().st_size} bytes, the manifest says {size}")
        file = safe_open(path, framework="pt")
        for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            kind, _, run = key.partition("/")
            parameter, _, first = run.rpartition("/")
            shape = file.get_slice(key).get_shape()
            if parameter not in self.shapes or len(shape) != 1 or not first.isdecimal():
                raise ValueError(f"it holds {key:.80}, which is no run of a parameter")
            self._runs[kind, parameter].append((int(first), shape[0], file, name, key))

    def _damaged(self, name: str, problem: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(self.folder / name, problem)

    def verify(self, names: Iterable[str]) -> None:
        """DamagedCheckpoint, with its name, if one of these files is not what was written. Reads each once."""
        for name in sorted(set(names) - self.verified):
            try:
                found = read_back(self.folder / name)
            except OSError as error:
                raise unreadable(self.folder / name, error) from error
            if found != self.files[name]:
                raise self._damaged(name, "its checksum is not the manifest's")
            self.verified.add(name)

    @property
    def images_seen(self) -> int:
        return self.manifest["images_seen"]

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self._runs}

    def read(self, kind: str, name: str, first: int, count: int) -> Tensor:
        """(count,) elements first..first+count-1 of the flattened parameter. DamagedCheckpoint, UserError if it has
        none of this kind.
        """
        out, got = torch.empty(count), 0
        for start, length, file, of, key in self._runs.get((kind, name), ()):
            low, high = max(first, start), min(first + count, start + length)
            if low < high:
                self.verify([of])
                out[low - first : high - first] = file.get_slice(key)[low - start : high - start]
                got += high - low
        if got != count:
            raise UserError(f"checkpoint {self.folder} holds {got} of {count} elements of {kind} of {name}")
        return out

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Every parameter in its shape: kind is "weight" or "ema"."""
        return {n: self.read(kind, n, 0, shape.numel()).reshape(shape) for n, shape in self.shapes.items()}

    def check_architecture(self, shapes: Mapping[str, torch.Size]) -> None:
        """UserError with the first differences if the parameters are not those of this checkpoint."""
        theirs, ours = dict(self.shapes), dict(shapes)
        if theirs != ours:
            names = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
            lines = [f"  {n}: checkpoint {_say(theirs.get(n))}, model {_say(ours.get(n))}" for n in names[:5]]
            raise UserError(
                f"checkpoint {self.folder} is of another architecture; {len(names)} parameters differ:\n"
                + "\n".join(lines)
                + "\nUse the network and conditioning it was trained with, or another folder (name=...)."
            )


def _say(shape: torch.Size | None) -> str:
    return "has none" if shape is None else "x".join(map(str, shape)) or "scalar"


@torch.no_grad()
def load(checkpoint: Checkpoint, sharding: Sharding) -> None:
    """Fills masters and optimizer state from a checkpoint of any world size and strategy. All ranks must call it."""
    checkpoint.check_architecture(shapes_of(sharding))
    optimizer, kinds = sharding.optimizer, checkpoint.kinds - {WEIGHT}
    if kinds:  # a checkpoint from before the first step has none
        for master in sharding.masters():
            step = torch.tensor(checkpoint.manifest["optimizer_steps"], dtype=torch.float32, device=master.device)
            optimizer.state[master] = {k: torch.zeros_like(master, requires_grad=False) for k in kinds} | {"step": step}
    for slot in sharding.slots():
        targets = {WEIGHT: slot.master.data} | {k: optimizer.state[slot.master][k] for k in kinds}
        for kind, target in targets.items():
            run = checkpoint.read(kind, slot.name, slot.first, slot.count)
            target.view(-1)[slot.at : slot.at + slot.count] = run.to(target.device)
    sharding.publish()
