"""Continuous integration runs each test, or has it in a turn: nothing falls between the commands, or runs twice."""

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cases import each
from conftest import ROOT

FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
MARKS = {"none": (False, False), "slow": (True, False), "gpu": (False, True), "slow and gpu": (True, True)}


@dataclass(frozen=True)
class Selection:
    """What one call of pytest runs: by a mark, and by files."""

    marks: str
    paths: tuple[Path, ...]
    ignored: tuple[Path, ...]

    @classmethod
    def of(cls, line: str) -> "Selection":
        words = shlex.split(line)
        return cls(
            words[words.index("-m", words.index("pytest")) + 1],
            tuple(Path(word) for word in words if word.startswith("tests")) or (Path("tests"),),
            tuple(Path(word.partition("=")[2]) for word in words if word.startswith("--ignore=")),
        )

    def has(self, file: Path, slow: bool, gpu: bool) -> bool:
        chosen = any(file.is_relative_to(path) for path in self.paths)
        ignored = any(file.is_relative_to(path) for path in self.ignored)
        return chosen and not ignored and eval(self.marks, {"slow": slow, "gpu": gpu})


def selections(*targets: str) -> list[Selection]:
    """Of the calls that `make <targets>` would make, were .venv complete and new."""
    dry = ["make", "--dry-run", "--assume-old=.venv/.ready", *targets]
    output = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Selection.of(line) for line in output.replace("\\\n", " ").splitlines() if "-m pytest" in line]


PARTS = [f"PART={part}" for part in range(4)]


@each(("slow", "gpu"), MARKS)
def test_continuous_integration_runs_every_test_once_or_in_its_turn(slow, gpu):
    script = (ROOT / ".ci" / "run").read_text()
    assert f"% {len(PARTS)}))" in script
    targets = re.findall(r"^make (\w+)", script, re.MULTILINE)
    turns = [selections(*targets, part) for part in PARTS]
    matrices = selections("matrices")
    for file in FILES:
        counts = [sum(s.has(file, slow, gpu) for s in turn) for turn in turns]
        assert counts == [1] * 4 or sorted(counts) == [0, 0, 0, 1], file
        if 0 in counts:
            assert sum(s.has(file, slow, gpu) for s in matrices) == 1, file


def test_the_files_that_the_commands_name_are_there():
    for selection in selections("check", "test", "matrices", "slurm"):
        for path in (*selection.paths, *selection.ignored):
            assert (ROOT / path).exists(), path


def test_a_check_runs_what_is_fast_and_needs_no_device():
    (found,) = selections("check")
    assert all(found.has(file, False, False) for file in FILES)
    assert not any(found.has(file, *marks) for file in FILES for marks in MARKS.values() if any(marks))
