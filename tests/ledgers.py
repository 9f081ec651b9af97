"""What the runs of spies.Ledger have trained on, and how they are killed."""

import json
import time
from pathlib import Path
from subprocess import Popen


def lines(run: Path) -> list[tuple[int, str]]:
    """Of all ranks; a killed one may have left half a line."""
    found = []
    for path in sorted(run.glob("ledger-*.jsonl")):
        for line in path.read_text().splitlines():
            if line.endswith("]"):
                found.append(tuple(json.loads(line)))
    return found


def tree(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(p for child in children for p in tree(int(child)))]


def until(run: Path, images: int, process: Popen) -> None:
    """Waits until a run has trained on so many images."""
    end = time.monotonic() + 400
    while not any(number >= images for number, _ in lines(run)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{run} never came to {images} images"
        time.sleep(0.02)
