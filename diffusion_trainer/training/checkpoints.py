"""Checkpoints: a folder that appears complete or not at all, in tensors and JSON (no file of it can run code).

    <run>/checkpoints/images-000102400/
        rank-00000.safetensors   this rank's runs of weight, ema, exp_avg, exp_avg_sq: "<kind>/<parameter>/<first>"
        manifest.json            progress, shapes, sizes of the files, what wrote it; written last
    <run>/checkpoints/latest     the name of the newest, replaced after the folder is in its place

Runs of elements are named by parameter and first element, so any world size and strategy reads what any other wrote.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import lightning
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.sharding import Sharding

FORMAT = 1
WEIGHT = "weight"
AFTER_DAMAGE = "Remove that checkpoint's folder to go on from the one before it."


def save(root: Path, images_seen: int, sharding: Sharding, state: Mapping, agreement: Agreement, keep: int) -> Path:
    """Writes <root>/images-<images_seen>, moves `latest` to it, then deletes all but the newest `keep` up to it.

    state: what else to resume, JSON. All ranks must call it. OSError, on all ranks, if any of them could not write;
    what was there before is intact then.
    """
    folder = root / f"images-{images_seen:012d}"
    part = root / f".{folder.name}.part"
    first = agreement.rank == 0

    def prepare() -> None:
        if first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def write() -> None:
        if first or not sharding.replicated:
            path = part / f"rank-{agreement.rank:05d}.safetensors"
            save_file(_tensors(sharding), path)
            _sync(path)

    def publish() -> None:
        if first:
            _write(
                part / "manifest.json", json.dumps(_manifest(part, images_seen, sharding, state, agreement), indent=1)
            )
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            _write(root / "latest", folder.name)
            for old in [p for p in sorted(root.glob("images-*")) if p.name <= folder.name][:-keep]:
                shutil.rmtree(old)

    for action in (prepare, write, publish):
        error = _problem(action)
        errors = [e for e in agreement.gather(error) if e]  # also the barrier between the phases
        if errors:
            if first:
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"checkpoint {folder} could not be written: {errors[0]}; the one before it is intact")
    return folder


def _problem(action: Callable[[], None]) -> str | None:
    try:
        action()
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        return str(error)
    return None


def _manifest(part: Path, images_seen: int, sharding: Sharding, state: Mapping, agreement: Agreement) -> dict:
    steps = {float(sharding.optimizer.state[m]["step"]) for m in sharding.masters() if m in sharding.optimizer.state}
    return {
        "format": FORMAT,
        "images_seen": images_seen,
        "optimizer_steps": max(steps, default=0.0),
        "parameters": {n: list(shape) for n, shape in _shapes(sharding).items()},
        "files": {p.name: p.stat().st_size for p in sorted(part.iterdir())},
        "state": dict(state),
        "written_by": {"world": agreement.world, "torch": torch.__version__, "lightning": lightning.__version__},
    }


def _shapes(sharding: Sharding) -> dict[str, torch.Size]:
    return {name: getattr(p, "ds_shape", p.shape) for name, p in sharding.model.named_parameters() if p.requires_grad}


def _tensors(sharding: Sharding) -> dict[str, Tensor]:
    tensors = {}
    for slot in sharding.slots():
        state = sharding.optimizer.state.get(slot.master, {})
        kinds = {WEIGHT: slot.master.data} | {k: v for k, v in state.items() if torch.is_tensor(v) and v.dim()}
        for kind, tensor in kinds.items():
            run = tensor.detach().reshape(-1)[slot.at : slot.at + slot.count]
            tensors[f"{kind}/{slot.name}/{slot.first}"] = run.cpu().contiguous().clone()
    return tensors


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    _sync(part)
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint under <run>/checkpoints, None if there is none yet."""
    if (root / "latest").is_file():
        named = root / (root / "latest").read_text().strip()
        if named.parent == root and (named / "manifest.json").is_file():
            return named
    whole = sorted(path.parent for path in root.glob("images-*/manifest.json"))
    return whole[-1] if whole else None


class Checkpoint:
    """A checkpoint folder, opened for reading; only the elements asked for are read from its files."""

    def __init__(self, folder: Path):
        """UserError if it is not one, or a file of it is missing or has another size."""
        self.folder = folder
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            found = {name: (folder / name).stat().st_size for name in self.manifest["files"]}
            wrong = [name for name, size in self.manifest["files"].items() if found[name] != size]
            if self.manifest["format"] != FORMAT:
                raise UserError(
                    f"checkpoint {folder} has format {self.manifest['format']}; this version reads {FORMAT}"
                )
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"{folder} is not a whole checkpoint ({error}). {AFTER_DAMAGE}") from error
        if wrong:
            raise UserError(
                f"checkpoint file {folder / wrong[0]} is damaged: its size is not the manifest's. {AFTER_DAMAGE}"
            )
        self.shapes = {name: torch.Size(shape) for name, shape in self.manifest["parameters"].items()}
        self._runs = defaultdict(list)  # (kind, parameter) -> [(first, open file, key)]
        for name in self.manifest["files"]:
            try:
                file = safe_open(folder / name, framework="pt")
            except SafetensorError as error:
                raise UserError(f"checkpoint file {folder / name} is damaged ({error}). {AFTER_DAMAGE}") from error
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                kind, parameter, first = key.split("/")
                self._runs[kind, parameter].append((int(first), file, key))

    @property
    def images_seen(self) -> int:
        return self.manifest["images_seen"]

    @property
    def kinds(self) -> set[str]:
        return {kind for kind, _ in self._runs}

    def read(self, kind: str, name: str, first: int, count: int) -> Tensor:
        """(count,) elements first..first+count-1 of the flattened parameter."""
        out, got = torch.empty(count), 0
        for start, file, key in self._runs[kind, name]:
            run = file.get_slice(key)
            low, high = max(first, start), min(first + count, start + run.get_shape()[0])
            if low < high:
                out[low - first : high - first] = run[low - start : high - start]
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
    checkpoint.check_architecture(_shapes(sharding))
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
