"""The sbatch script, with stand-ins for SLURM's commands (tests/slurm runs it on a real one)."""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import soak
from conftest import ROOT

SCRIPT = ROOT / "launch" / "train.sbatch"
ASKED = "--partition=main --time=1-00:00:00 --cpus-per-task=4 --nodes=2 --ntasks-per-node=8"  # of the job, for another


@pytest.fixture
def cluster(tmp_path):
    """A folder with a .venv that echoes its arguments, and srun and scontrol on the path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    job = f"JobId=41234 JobState=RUNNING TimeLimit=1-00:00:00 StdOut={tmp_path}/the log Power="
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
    return environment | {
        "SLURM_JOB_ID": "41234", "SLURMD_NODENAME": "n1", "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_PARTITION": "main",
    }  # fmt: skip


@pytest.fixture
def start(cluster, tmp_path):
    """start(code, *arguments): what a start of the job does whose ranks end with this exit code."""

    def start(code: int, *arguments: str, script=SCRIPT) -> subprocess.CompletedProcess:
        (tmp_path / "code").write_text(str(code))
        return subprocess.run(["bash", script, *arguments], env=cluster, capture_output=True, text=True)

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


def test_arguments_and_exit_code_pass_through(start):
    arguments = ["experiment=digits", "data.shards=a b/*.tar", "network.channel_multipliers=[1,2]"]
    result = start(3, *arguments)
    assert result.returncode == 3, result.stderr
    assert result.stdout.splitlines() == [
        "srun --kill-on-bad-exit=1 at 10.0.0.7:25234 cpus 4",
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
    assert f"log     {tmp_path}/the log\n" in result.stderr
    assert f"resume  sbatch {ASKED} launch/train.sbatch name=a\\ b\n" in result.stderr
    assert not list(tmp_path.glob("slurm-*"))


def test_the_job_that_is_shown_to_resume_has_what_this_one_was_asked_for(start, cluster):
    cluster |= {"SLURM_GPUS_PER_NODE": "8", "SLURM_JOB_ACCOUNT": "me"}
    for _ in range(3):
        result = start(1)
    asked = ASKED.replace(" --time", " --account=me --time").replace(" --nodes", " --gpus-per-node=8 --nodes")
    assert f"resume  sbatch {asked} launch/train.sbatch\n" in result.stderr


def test_a_checkpoint_that_was_there_before_the_job_is_no_progress_of_it(start, with_line, requeued, tmp_path):
    latest = tmp_path / "my run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("images-100")
    script = with_line("folder= ", "folder='my run' ")
    stops = ["3 starts in a row" in start(1, script=script).stderr for _ in range(3)]
    assert (stops, requeued()) == ([False, False, True], 2)


def test_words_of_an_earlier_start_are_not_those_of_one_that_dies_at_once(start, with_line, tmp_path):
    logs = tmp_path / "my run" / "logs"
    logs.mkdir(parents=True)
    for name in ("failed-rank-3.txt", "state-rank-0.json", "rank-1.log"):
        (logs / name).touch()
    assert "post_mortem" not in start(1, script=with_line("folder= ", "folder='my run' ")).stderr
    assert [path.name for path in logs.iterdir()] == ["rank-1.log"]


def test_a_mistake_that_a_killed_start_has_left_is_not_that_of_this_one(start, tmp_path):
    mistake = tmp_path / "slurm-41234.mistake"
    mistake.touch()
    assert start(0).returncode == 0
    assert not mistake.exists()


@pytest.mark.parametrize(("restarts", "port"), [("", 25234), ("0", 25234), ("1", 21153), ("3", 24991)])
def test_another_start_meets_at_another_port(start, cluster, restarts, port):
    cluster["SLURM_RESTART_COUNT"] = restarts
    assert f" at 10.0.0.7:{port} " in start(0).stdout


def test_python_may_be_a_command_of_the_path_as_a_container_is(start, with_line):
    line = 'python=("$PWD/.venv/bin/python") '
    result = start(0, "name=x", script=with_line(line, 'python=(env A=1 "$PWD/.venv/bin/python") '))
    assert result.returncode == 0, result.stderr
    assert "<diffusion_trainer><train><name=x>" in result.stdout


@pytest.fixture
def careful(with_line):
    """The script with the doctor switched on."""
    return with_line("doctor= ", "doctor=doctor.slow=0.5 ")


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


@pytest.fixture
def soaked(monkeypatch, tmp_path):
    """soaked(*arguments): tests/soak.py with stand-ins for the cluster and the run; what it was to do. In the folder
    are shards, a folder for it, and one with another soak's runs.
    """
    for name in ("shards", "old/runs"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked, report = [], soak.Report(same_curve=True)
    monkeypatch.setattr(soak, "local_cluster", lambda folder: nullcontext())
    monkeypatch.setattr(soak, "soak", lambda folder, cluster, **how: asked.append((folder, how)) or report)

    def soaked(*arguments: str):
        asked.clear()
        assert soak.main(["--shards=shards", *arguments]) == 0
        return asked[0]

    return soaked


def test_a_soak_may_begin_in_a_folder_where_one_could_not_begin(soaked, tmp_path):
    for _ in range(2):
        folder, how = soaked("--folder=new", "--only=requeued,killed_rank")
        assert how["kinds"] == [soak.killed_rank, soak.requeued]
        assert (folder / "shards" / "digits").resolve() == tmp_path / "shards"
    assert soaked()[1]["kinds"] == [*soak.FAULTS]


@pytest.mark.parametrize(
    ("mistake", "says"),
    [("--only=killed_rank,requeue", "there is no requeue; the kinds are"), ("--folder=old", "old has runs already")],
)
def test_mistakes_in_a_soaks_arguments_are_told_before_there_is_a_cluster(soaked, mistake, says, monkeypatch, capsys):
    monkeypatch.delattr(soak, "local_cluster")
    with pytest.raises(SystemExit, match="2"):
        soaked(mistake)
    assert says in capsys.readouterr().err
