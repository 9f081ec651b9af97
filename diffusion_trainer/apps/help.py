"""What --help prints: the configuration folder, which documents itself."""

from collections.abc import Sequence
from pathlib import Path

from diffusion_trainer.apps.config import CONF
from diffusion_trainer.apps.places import PLACES

ALSO = {"submit": "train", "doctor": "train"}  # a verb -> the one whose arguments it takes, too
CALLED = {"sweep": "<verb> -m", **{verb: f"{verb} [-m]" for verb in PLACES}}  # any other: by its name alone


def describe(verb: str) -> str:
    """The verb's own keys with their comments, then each group with its options."""
    text = (CONF / f"{verb}.yaml").read_text()
    groups = [p for p in sorted(CONF.iterdir()) if p.is_dir() and f"- {p.name}:" in text]
    lines = [
        f"usage: diffusion-trainer {CALLED.get(verb, verb)} [group=option] [key=value] ...",
        "",
        f"keys and defaults (conf/{verb}.yaml)",
    ]
    lines += [f"  {line}" for line in text.splitlines()]
    if groups:
        lines += _options(groups)
    if verb in ALSO:
        lines += ["", "and those of", "", describe(ALSO[verb])]
    return "\n".join(lines)


def _options(groups: Sequence[Path]) -> list[str]:
    options = [option for group in groups for option in sorted(group.glob("*.yaml"))]
    names = [f"{option.parent.name}={option.stem}" for option in options]
    width = max(map(len, names))
    head = ["", "groups and their options (conf/<group>/<option>.yaml has the keys: set them with group.key=value)"]
    return head + [f"  {name:<{width}}  {_purpose(o.read_text())}" for name, o in zip(names, options, strict=True)]


def _purpose(text: str) -> str:
    """The first comment that is not an instruction to Hydra."""
    comments = [line[2:] for line in text.splitlines() if line.startswith("# ") and not line.startswith("# @")]
    return comments[0] if comments else ""
