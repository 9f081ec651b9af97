"""The points of a sweep and where they write: each to a file or folder of its own, named after its swept overrides."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from diffusion_trainer.apps.completion import trained
from diffusion_trainer.apps.initial import checkpoint_in, run_of

LONGEST = 120  # characters of a label: with digest and suffix it is a file's name, which may have 255


@dataclass(frozen=True)
class Place:
    settings: Mapping[str, str]  # the verb's keys that say it
    out: Path  # the file or folder that the point writes
    report: Path | None  # the JSON file with its "metrics", if the verb writes one
    home: Path  # the sweep's folder
    complete: Callable[[Mapping[str, Any]], bool] | None = None  # told from its files and configuration, if they do

    def stands(self) -> bool:
        """Whether what the point writes is there."""
        return self.out.exists() or Path(f"{self.out}.npz").exists()


@dataclass(frozen=True)
class Point:
    """One combination."""

    swept: tuple[str, ...]  # key=value
    overrides: tuple[str, ...]  # all of them, those that say where to write last
    place: Place
    config: Mapping[str, Any] = field(default_factory=dict)  # resolved

    @property
    def title(self) -> str:
        return " ".join(self.swept)

    @property
    def key(self) -> str:
        """Differs where the configuration does, or the checkpoint that it names has become another."""
        checkpoint = self.config.get("checkpoint")
        manifest = checkpoint_in(Path(checkpoint)) / "manifest.json" if checkpoint else None
        read = manifest.read_text() if manifest and manifest.is_file() else ""
        return blake2b((json.dumps(self.config, sort_keys=True) + read).encode(), digest_size=16).hexdigest()


def label(swept: Sequence[str]) -> str:
    """A file's name for swept overrides (key=value), of characters that Hydra and shells leave alone.

    Where that changes them, a digest keeps the names of different overrides different.
    """
    text = "+".join(o.lstrip("+").replace("=", "-", 1) for o in swept)
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)[:LONGEST]
    return plain if plain == text else f"{plain}-{blake2b(text.encode(), digest_size=4).hexdigest()}"


def of_train(config: Mapping[str, Any], swept: Sequence[str]) -> Place:
    """Inside the folder that the configuration names; a swept name or folder is not repeated in the label."""
    own = label([o for o in swept if o.lstrip("+").split("=")[0] not in ("name", "folder")])
    name, folder = Path(config["name"]) / own, Path(config["folder"]) / own
    return Place({"name": str(name), "folder": str(folder)}, folder, folder / "metrics.json", folder.parent, trained)


def of_reports(verb: str, config: Mapping[str, Any], swept: Sequence[str]) -> Place:
    """For verbs that write one JSON file."""
    home = _home(verb, config)
    out = Path(config["out"] or home / f"{label(swept)}.json")
    return Place({"out": str(out)}, out, out, home)


def of_sample(config: Mapping[str, Any], swept: Sequence[str]) -> Place:
    home = _home("sample", config)
    out = Path(config["out"] or home / label(swept))
    return Place({"out": str(out)}, out, None, home)


def _home(verb: str, config: Mapping[str, Any]) -> Path:
    return run_of(checkpoint_in(Path(config["checkpoint"]))) / "multirun" / verb


PLACES = {
    "train": of_train,
    "evaluate": partial(of_reports, "evaluate"),
    "likelihood": partial(of_reports, "likelihood"),
    "sample": of_sample,
}
