"""launch/train.sbatch with stand-ins for SLURM's commands: fixtures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "launch" / "train.sbatch"
ASKED = "--partition=main --time=1-00:00:00 --cpus-per-task=4 --nodes=2 --ntasks-per-node=8"  # of the job, for another


def stand_ins(folder: Path, tools: Path) -> dict[Path, str]:
    """Their files, and what bash runs there."""
    job = f"JobId=41234 JobState=RUNNING TimeLimit=1-00:00:00 StdOut={folder}/the log"
    return {
        tools / "scontrol": f"""
case "$1 $2" in
  "show node") echo "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 State=ALLOCATED" ;;
  "show job")
    if [ -e slow ] && [ -e sruns ]; then touch asked; sleep 2; fi
    restarts=$(cat restarts 2> /dev/null || echo ${{SLURM_RESTART_COUNT:-0}})
    requeues=$(cat requeues 2> /dev/null || echo 1) end=$(cat end 2> /dev/null || echo Unknown)
    echo "{job} Requeue=$requeues Restarts=$restarts EndTime=$end Power=" ;;
  *) echo "$@" >> requeued ;;
esac""",
        tools / "srun": """
options=
while [[ $1 == --* ]]; do
  options+="$1 "
  [[ $1 != --ntasks=* ]] || SLURM_NTASKS=${1#*=}
  shift
done
[ ! -e replaced ] || cp replaced restarts
[ "${SLURM_EXPORT_ENV:-}" != NONE ] || set -- env -u mistake -u stopped "$@"
echo "srun ${options}at $MASTER_ADDR:$MASTER_PORT cpus $SRUN_CPUS_PER_TASK" >> sruns
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank "$@" > "said-$rank"
  ((code = $? > ${code:-0} ? $? : ${code:-0}))
done
cat said-0 && rm said-*
exit $code""",
        folder / ".venv" / "bin" / "python": f"""
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
if [ "${{@: -1}}" = --config ]; then echo "folder: my run"; exit; fi
printf "<%s>" "$@"; echo
if [ "$4" = doctor ]; then
  [ ! -e doctor-kill ] || kill -s $(cat doctor-kill) $PPID
  exit $(cat doctor-code 2> /dev/null || echo 0)
fi
if [ -e "kill-$SLURM_PROCID" ]; then kill -s $(cat "kill-$SLURM_PROCID") $PPID; fi
exit $(cat "code-$SLURM_PROCID" 2> /dev/null || cat code)""",
    }


@pytest.fixture
def cluster(tmp_path):
    """A folder with a .venv that echoes its arguments, and srun and scontrol on the path. Files in it are for ranks
    that train: code-<rank>, or code for all, their exit codes; kill-<rank>: a signal to the shell that watches one;
    doctor-code and doctor-kill: the same for the doctor's; slow: scontrol is, after the ranks have ended;
    requeues: 0, the job is not to be put back.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for path, text in stand_ins(tmp_path, tools).items():
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    return environment | {
        "SLURM_JOB_ID": "41234", "SLURMD_NODENAME": "n1", "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_PARTITION": "main", "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }  # fmt: skip


@pytest.fixture
def start(cluster, tmp_path):
    """start(code, *arguments): what a start of the job does whose ranks end with this exit code."""

    def start(code: int, *arguments: str, script=SCRIPT, log=subprocess.PIPE) -> subprocess.CompletedProcess:
        (tmp_path / "code").write_text(str(code))
        return subprocess.run(["bash", script, *arguments], env=cluster, stdout=log, stderr=log, text=True)

    return start


@pytest.fixture
def with_line(tmp_path):
    """with_line(line, other): the script with a line of its set-up that begins otherwise."""

    def with_line(line: str, other: str):
        text, path = SCRIPT.read_text(), tmp_path / "other.sbatch"
        assert text.count(f"\n{line}") == 1
        path.write_text(text.replace(f"\n{line}", f"\n{other}"))
        return path

    return with_line


@pytest.fixture
def requeued(tmp_path):
    """How often the job has been put back into the queue."""
    path = tmp_path / "requeued"
    return lambda: path.read_text().count("requeue 41234\n") if path.exists() else 0


def stops(start, count: int, code: int) -> list[bool]:
    """Of so many starts: whether each was the last."""
    return ["in a row without a newer checkpoint, so not once more" in start(code).stderr for _ in range(count)]
