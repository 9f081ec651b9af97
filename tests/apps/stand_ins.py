"""Stand-ins for SLURM's commands: they keep what they are told, and say what a test has them say."""

from pathlib import Path

SCRIPTS = {
    "sbatch": """
if [ "$1" = --test-only ]; then
  cat > rehearsed
  if [ -f refusal ]; then cat refusal >&2; exit 1; fi
  echo "sbatch: Job 7 to start at noon" >&2
else
  env > environment; echo "$@" > submitted; echo "4711;here"
fi""",
    "squeue": "cat queue",
    "scancel": 'echo "$@" > cancelled',
    "sinfo": 'printf "main|1-00:00:00|2\\ndebug|30:00|1\\n"',
    "scontrol": "cat job 2> /dev/null || { cat complaint >&2; exit 1; }",
}


class Commands:
    """In a folder, which goes on PATH; `read` and `write` are of the files that they keep or answer with."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name, text in SCRIPTS.items():
            (folder / name).write_text(f'#!/bin/bash\ncd "{folder}"\n{text}\n')
            (folder / name).chmod(0o755)
        self.write("queue", "")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def read(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text() if path.exists() else None
