"""Imports go down the floors of the package, and only where a floor may look."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "diffusion_trainer"
MATHS = {"conventions", "process"}
MODELS = {"networks", "conditioning"}
FLOORS = {  # who may import whom, besides itself
    "conventions": set(),
    "process": {"conventions"},
    "objectives": MATHS,
    "sampling": MATHS,
    "networks": {"conventions"},
    "conditioning": {"conventions"},
    "streaming": {"conventions"},
    "training": MATHS | MODELS | {"objectives", "sampling"},
    "evaluation": MATHS | MODELS | {"objectives", "sampling", "training", "streaming"},
    "callbacks": MATHS | MODELS | {"objectives", "sampling", "training", "streaming", "evaluation"},
    "apps": MATHS | MODELS | {"objectives", "sampling", "training", "streaming", "evaluation", "callbacks"},
    "__main__": {"apps"},
}
ONLY = {  # a library -> the only files that may import it
    "hydra": {"apps/config.py"},
    "omegaconf": {"apps/config.py"},
    "deepspeed": {"training/strategies.py"},
    "wandb": {f"callbacks/{name}.py" for name in ("loggers", "wandb_curve", "wandb_files", "wandb_session")},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = str(path.relative_to(PACKAGE))
    floor = here.split("/")[0].removesuffix(".py")
    for name in imports(path):
        root, *rest = name.split(".")
        if root == "diffusion_trainer" and rest and floor != "__init__" and rest[0] != "__version__":
            assert rest[0] == floor or rest[0] in FLOORS[floor], f"{here} may not import {name}"
        assert here in ONLY.get(root, {here}), f"only {ONLY.get(root)} may import {root}, not {here}"


def test_every_folder_has_its_floor():
    folders = {p.parent.name if p.parent != PACKAGE else p.stem for p in FILES} - {"diffusion_trainer", "__init__"}
    assert folders == set(FLOORS)
