"""The sbatch script, with stand-ins for SLURM's commands (tests/slurm runs it on a real one)."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = ROOT / "launch" / "train.sbatch"


@pytest.fixture
def cluster(tmp_path):
    """A folder with a .venv that echoes its arguments, and srun and scontrol on the path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    job = f"JobId=41234 JobState=RUNNING StdOut={tmp_path}/log"
    scripts = {
        tools / "scontrol": f"""
case "$1 $2" in
  "show node") echo "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 State=ALLOCATED" ;;
  "show job") echo "{job}" ;;
  *) echo "$@" >> requeued ;;
esac""",
        tools / "srun": """
echo "srun $1 at $MASTER_ADDR:$MASTER_PORT cpus $SRUN_CPUS_PER_TASK"
"${@:2}"
code=$?
exit $(cat srun-code 2> /dev/null || echo $code)""",
        tmp_path / ".venv" / "bin" / "python": f"""
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
if [ "${{@: -1}}" = --config ]; then echo "folder: my run"; exit; fi
printf "<%s>" "$@"; echo; exit $(cat code)""",
    }
    for path, text in scripts.items():
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    return environment | {"SLURM_JOB_ID": "41234", "SLURMD_NODENAME": "n1", "SLURM_CPUS_PER_TASK": "4"}


@pytest.fixture
def start(cluster, tmp_path):
    """start(code, *arguments): what a start of the job does whose ranks end with this exit code."""

    def start(code: int, *arguments: str, script=SCRIPT) -> subprocess.CompletedProcess:
        (tmp_path / "code").write_text(str(code))
        return subprocess.run(["bash", script, *arguments], env=cluster, capture_output=True, text=True)

    return start


@pytest.fixture
def requeued(tmp_path):
    """How often the job has been put back into the queue."""
    path = tmp_path / "requeued"
    return lambda: path.read_text().count("requeue 41234\n") if path.exists() else 0


def test_arguments_and_exit_code_pass_through(start):
    arguments = ["experiment=digits", "data.shards=a b/*.tar", "network.channel_multipliers=[1,2]"]
    result = start(3, *arguments)
    assert result.returncode == 3, result.stderr
    assert result.stdout.splitlines() == [
        "srun --kill-on-bad-exit=1 at 10.0.0.7:21234 cpus 4",
        f"<-P><-m><diffusion_trainer><train><{'><'.join(arguments)}>",
    ]


def test_a_checkout_without_set_up_is_named(start, tmp_path):
    (tmp_path / ".venv" / "bin" / "python").unlink()
    result = start(0)
    assert result.returncode == 2
    assert "run make setup there first" in result.stderr


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_done_and_what_is_a_mistake_is_not_started_again(start, requeued, tmp_path, code):
    before = {*tmp_path.iterdir()}
    assert start(code).returncode == code
    assert requeued() == 0
    assert {*tmp_path.iterdir()} == before | {tmp_path / "code"}


def test_a_mistake_that_one_rank_sees_counts_though_srun_reports_another_that_had_to_stop(start, requeued, tmp_path):
    (tmp_path / "srun-code").write_text("143")
    result = start(2)
    assert (result.returncode, requeued()) == (2, 0)
    assert not list(tmp_path.glob("slurm-*"))


@pytest.mark.parametrize("code", [75, 1, 143, 138, 137])
def test_a_rollback_a_crash_and_a_stop_are_started_again(start, requeued, code):
    """75: a rank that goes back to an earlier checkpoint (processes.ROLLED_BACK)."""
    result = start(code)
    assert result.returncode == code
    assert f"exit code {code}: back into the queue, to resume from checkpoint none" in result.stderr
    assert requeued() == 1


def test_three_starts_without_a_newer_checkpoint_are_the_last(start, requeued, tmp_path):
    latest = tmp_path / "my run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    start(1)
    latest.write_text("images-1")
    for i in range(4):  # the first of them ends with a newer one
        assert requeued() == 1 + i
        result = start(1, "name=a b")
    assert requeued() == 4
    assert "3 starts in a row without a newer checkpoint" in result.stderr
    assert f"log     {tmp_path}/log" in result.stderr
    assert "resume  sbatch --nodes= --ntasks-per-node= launch/train.sbatch name=a\\ b" in result.stderr
    assert not list(tmp_path.glob("slurm-*"))


@pytest.fixture
def careful(tmp_path):
    """The script with the doctor switched on."""
    path, line = tmp_path / "careful.sbatch", "\ndoctor= "
    assert line in SCRIPT.read_text()
    path.write_text(SCRIPT.read_text().replace(line, "\ndoctor=doctor.slow=0.5 "))
    return path


def test_the_doctor_looks_at_all_nodes_before_the_run(start, careful):
    lines = start(0, "name=x", script=careful).stdout.splitlines()
    assert [line.split(">", 3)[3] for line in lines[1::2]] == ["<doctor><doctor.slow=0.5><name=x>", "<train><name=x>"]


@pytest.mark.parametrize(("code", "again"), [(1, 1), (2, 0)])
def test_what_the_doctor_finds_keeps_the_run_from_these_nodes(start, careful, requeued, code, again):
    """2: a mistake, which other nodes would not mend."""
    result = start(code, script=careful)
    assert (result.returncode, requeued()) == (code, again)
    assert "<train>" not in result.stdout


@pytest.mark.parametrize(
    ("left", "shown"), [("state-rank-1.json", True), ("failed-rank-0.txt", True), ("a.log", False)]
)
def test_a_post_mortem_is_in_the_log_where_ranks_did_not_end_in_order(start, tmp_path, left, shown):
    (tmp_path / "my run" / "logs").mkdir(parents=True)
    (tmp_path / "my run" / "logs" / left).touch()
    result = start(1)
    assert ("<-P><-m><diffusion_trainer.apps.post_mortem><my run>" in result.stderr) == shown
    assert "back into the queue" in result.stderr
