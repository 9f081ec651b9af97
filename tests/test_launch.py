"""The sbatch script, with stand-ins for SLURM's commands (tests/slurm runs it on a real one)."""

import functools
import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import soak
from conftest import ROOT

SCRIPT = ROOT / "launch" / "train.sbatch"
ASKED = "--partition=main --time=1-00:00:00 --cpus-per-task=4 --nodes=2 --ntasks-per-node=8"  # of the job, for another


@pytest.fixture
def cluster(tmp_path):
    """A folder with a .venv that echoes its arguments, and srun and scontrol on the path. Files in it are for ranks
    that train: code-<rank>, or code for all, their exit codes; kill-<rank>: a signal to the shell that watches one;
    doctor-code and doctor-kill: the same for the doctor's.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    job = f"JobId=41234 JobState=RUNNING TimeLimit=1-00:00:00 StdOut={tmp_path}/the log"
    scripts = {
        tools / "scontrol": f"""
case "$1 $2" in
  "show node") echo "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 State=ALLOCATED" ;;
  "show job")
    restarts=$(cat restarts 2> /dev/null || echo ${{SLURM_RESTART_COUNT:-0}})
    echo "{job} Restarts=$restarts EndTime=$(cat end 2> /dev/null || echo Unknown) Power=" ;;
  *) echo "$@" >> requeued ;;
esac""",
        tools / "srun": """
options=
while [[ $1 == --* ]]; do
  options+="$1 "
  [[ $1 != --ntasks=* ]] || SLURM_NTASKS=${1#*=}
  shift
done
[ "${SLURM_EXPORT_ENV:-}" != NONE ] || set -- env -u mistake -u stopped "$@"
echo "srun ${options}at $MASTER_ADDR:$MASTER_PORT cpus $SRUN_CPUS_PER_TASK" >> sruns
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank "$@" > "said-$rank"
  ((code = $? > ${code:-0} ? $? : ${code:-0}))
done
cat said-0 && rm said-*
exit $code""",
        tmp_path / ".venv" / "bin" / "python": f"""
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
    for path, text in scripts.items():
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


def test_arguments_and_exit_code_pass_through(start, tmp_path):
    arguments = ["experiment=digits", "data.shards=a b/*.tar", "network.channel_multipliers=[1,2]"]
    result = start(3, *arguments)
    assert result.returncode == 3, result.stderr
    doctor, train = result.stdout.splitlines()
    given = "><".join(arguments)
    assert train == f"<-P><-m><diffusion_trainer><train><{given}>"
    lead, processes = "doctor.signal_lead_seconds=120", "doctor.processes=2"
    assert doctor == f"<-P><-m><diffusion_trainer><doctor><{lead}><{processes}><{given}>"
    assert (tmp_path / "sruns").read_text().splitlines() == [
        "srun --ntasks=2 --ntasks-per-node=1 --mem=0 --kill-on-bad-exit=0 at 10.0.0.7:25234 cpus 4",
        "srun --kill-on-bad-exit=1 at 10.0.0.7:25234 cpus 4",
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
    assert {*tmp_path.iterdir()} == before | {tmp_path / "code", tmp_path / "sruns"}


@pytest.mark.parametrize("export", ["ALL", "NONE"])
def test_a_mistake_that_one_rank_sees_counts_though_srun_reports_another_that_had_to_stop(
    start, cluster, requeued, tmp_path, export
):
    """export: what sbatch has told srun to hand on."""
    cluster["SLURM_EXPORT_ENV"] = export
    for rank, code in enumerate((143, 2)):
        (tmp_path / f"code-{rank}").write_text(str(code))
    result = start(0)
    assert (result.returncode, requeued()) == (2, 0)
    assert not list(tmp_path.glob("slurm-*"))


def test_a_mistake_of_a_later_start_is_a_crash_like_others(start, cluster, requeued, tmp_path):
    """A node that lacks a mount, a folder that ranks of a lost node still hold: the first start met none of that."""
    cluster["SLURM_RESTART_COUNT"] = "1"
    assert [start(2).returncode for _ in range(3)] == [2, 2, 2]
    assert requeued() == 2
    assert not list(tmp_path.glob("slurm-*"))


def test_a_start_that_slurm_has_replaced_by_another_leaves_the_job_alone(start, requeued, tmp_path):
    (tmp_path / "restarts").write_text("1")
    result = start(1)
    assert (result.returncode, requeued()) == (1, 0)
    assert "post_mortem" not in result.stderr


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
    assert f"resume  cd {tmp_path} && sbatch {ASKED} launch/train.sbatch name=a\\ b\n" in result.stderr
    assert not list(tmp_path.glob("slurm-*"))


def test_the_job_that_is_shown_to_resume_has_what_this_one_was_asked_for(start, cluster, tmp_path):
    cluster |= {
        "SLURM_GPUS_PER_NODE": "8",
        "SLURM_JOB_ACCOUNT": "me",
        "SLURM_JOB_QOS": "high",
        "SLURM_MEM_PER_NODE": "900",
    }
    for _ in range(3):
        result = start(1)
    asked = ASKED.replace(" --time", " --account=me --qos=high --mem=900 --time")
    asked = asked.replace(" --nodes", " --gpus-per-node=8 --nodes")
    assert f"resume  cd {tmp_path} && sbatch {asked} launch/train.sbatch\n" in result.stderr


def test_a_checkpoint_that_was_there_before_the_job_is_no_progress_of_it(start, with_line, requeued, tmp_path):
    latest = tmp_path / "my run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("images-100")
    script = with_line("folder= ", "folder='my run' ")
    stops = ["3 starts in a row" in start(1, script=script).stderr for _ in range(3)]
    assert (stops, requeued()) == ([False, False, True], 2)


@pytest.mark.parametrize("spoilt", [".starts", ".looked", "the log"])
def test_what_cannot_be_written_does_not_end_a_job(start, requeued, tmp_path, spoilt):
    with open("/dev/full", "w") as full:
        if spoilt != "the log":
            (tmp_path / f"slurm-41234{spoilt}").mkdir()
        for starts in (1, 2):
            assert start(1, log=full if spoilt == "the log" else subprocess.PIPE).returncode == 1
            assert requeued() == starts


@pytest.fixture
def away(tmp_path):
    """away(times): the controller does not answer the first so many times that it is asked each thing."""

    def away(times: int) -> None:
        path = tmp_path / "tools" / "scontrol"
        down = f'echo "$1 $2" >> asked\n[ "$(grep -cx "$1 $2" asked)" -gt {times} ] || exit 1\n'
        path.write_text(path.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\n{down}"))
        (tmp_path / "tools" / "sleep").symlink_to("/bin/true")

    return away


def test_a_controller_that_does_not_answer_for_a_while_ends_no_job(start, requeued, away):
    away(10)
    result = start(137)
    assert (result.returncode, requeued()) == (137, 1), result.stderr
    assert "<train>" in result.stdout


def test_a_controller_that_is_gone_ends_it(start, requeued, away):
    away(1000)
    result = start(137)
    assert (result.returncode, requeued()) == (1, 0)
    assert "<train>" not in result.stdout


def test_several_jobs_at_once_for_one_run_are_refused(start, cluster):
    cluster["SLURM_ARRAY_JOB_ID"] = "41230"
    result = start(0)
    assert (result.returncode, result.stdout) == (2, "")
    assert "no array" in result.stderr


def test_a_mistake_that_a_killed_start_has_left_is_not_that_of_this_one(start, tmp_path):
    mistake = tmp_path / "slurm-41234.mistake"
    mistake.touch()
    assert start(0).returncode == 0
    assert not mistake.exists()


def test_that_a_killed_start_was_told_to_stop_is_no_word_of_this_one(start, cluster, tmp_path):
    cluster["DOCTOR"] = "false"
    told = [tmp_path / f"slurm-41234.stopped-{rank}" for rank in range(2)]
    for last in (False, False, True):
        for path in told:
            path.touch()
        assert stops(start, 1, 1) == [last]


@pytest.mark.parametrize(("restarts", "port"), [("", 25234), ("0", 25234), ("1", 21153), ("3", 24991)])
def test_another_start_meets_at_another_port(start, cluster, tmp_path, restarts, port):
    cluster["SLURM_RESTART_COUNT"] = restarts
    start(0)
    assert f" at 10.0.0.7:{port} " in (tmp_path / "sruns").read_text()


def test_python_may_be_a_command_of_the_path_as_a_container_is(start, with_line):
    line = 'python=("$PWD/.venv/bin/python") '
    result = start(0, "name=x", script=with_line(line, 'python=(env A=1 "$PWD/.venv/bin/python") '))
    assert result.returncode == 0, result.stderr
    assert "<diffusion_trainer><train><name=x>" in result.stdout


@pytest.fixture
def looked(start):
    """looked(code): whether the doctor looks at the nodes before such a start; the start itself."""

    def looked(code: int, **how) -> tuple[bool, subprocess.CompletedProcess]:
        result = start(code, **how)
        return "<doctor>" in result.stdout, result

    return looked


@pytest.mark.parametrize(("code", "again"), [(1, 1), (2, 0)])
def test_what_the_doctor_finds_keeps_the_run_from_these_nodes(start, requeued, tmp_path, code, again):
    """2: a mistake, which other nodes would not mend."""
    (tmp_path / "doctor-code").write_text(str(code))
    for starts in (1, 2):
        result = start(0)
        assert (result.returncode, requeued()) == (code, again * starts)
        assert "<train>" not in result.stdout


def test_nodes_that_the_doctor_has_let_pass_he_looks_at_again_only_after_a_crash(looked, cluster):
    assert looked(143)[0]
    assert not looked(143)[0]
    cluster["SLURM_JOB_NODELIST"] = "n[1,3]"
    assert looked(143)[0]
    assert not looked(1)[0]
    assert looked(0)[0]


def test_without_a_doctor_the_run_comes_first(looked, cluster, with_line):
    for no in ("", "0", "false", "False", "no"):
        cluster["DOCTOR"] = no
        assert not looked(0)[0]
    cluster["DOCTOR"] = "true"
    assert looked(0)[0]
    assert not looked(0, script=with_line("doctor=", "doctor=false # "))[0]


def test_how_early_the_signal_comes_and_who_looks_is_kept_for_the_next_job(start, cluster, tmp_path):
    cluster |= {"LEAD": "600", "DOCTOR": "true"}
    for _ in range(3):
        result = start(1)
    assert "<doctor><doctor.signal_lead_seconds=600>" in result.stdout
    again = f"cd {tmp_path} && DOCTOR=true LEAD=600 sbatch --signal=TERM@600 {ASKED} launch/train.sbatch"
    assert f"resume  {again}\n" in result.stderr


def test_a_run_does_not_begin_where_the_doctor_was_told_to_stop(start, requeued, tmp_path):
    (tmp_path / "doctor-kill").write_text("TERM")
    for starts in range(1, 5):
        result = start(0)
        assert (result.returncode, requeued()) == (143, starts)
        (tmp_path / "slurm-41234.looked").unlink(missing_ok=True)
        assert "<train>" not in result.stdout


def stops(start, count: int, code: int) -> list[bool]:
    """Of so many starts: whether each was the last."""
    return ["in a row without a newer checkpoint, so not once more" in start(code).stderr for _ in range(count)]


def test_stops_without_end_end_too(start, requeued, with_line):
    few = functools.partial(start, script=with_line("max_all=20 ", "max_all=5 "))
    assert (stops(few, 5, 143), requeued()) == ([False] * 4 + [True], 4)


def test_a_stop_is_one_in_a_folder_whose_name_is_a_pattern(start, cluster, tmp_path):
    place = tmp_path / "a[b]c"
    place.mkdir()
    for name in (".venv", "code"):
        (place / name).symlink_to(tmp_path / name)
    cluster["SLURM_SUBMIT_DIR"] = str(place)
    assert stops(start, 3, 143) == [False] * 3


@pytest.mark.parametrize("code", [143, 138, 140, 129, 130])
def test_five_stops_while_it_starts_are_five_requeues(start, requeued, code):
    assert (stops(start, 5, code), requeued()) == ([False] * 5, 5)
    assert stops(start, 3, 1) == [False, False, True]  # crashes are counted all the same


def test_stops_between_them_forgive_no_crash(start):
    assert [*stops(start, 1, 1), *stops(start, 2, 143), *stops(start, 2, 1)] == [False] * 4 + [True]


def test_a_stop_after_a_newer_checkpoint_forgives_those_before(start, tmp_path):
    latest = tmp_path / "my run" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    assert stops(start, 2, 1) == [False, False]
    latest.write_text("images-1")
    assert [*stops(start, 1, 143), *stops(start, 3, 1)] == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("files", "crash"),
    [
        ({"code-0": 143, "code-1": 1}, True),  # the others stop because of it, and srun tells of them
        ({"code-0": 143, "kill-1": "KILL"}, True),  # with its shell, as for want of memory
        ({"code-0": 143, "code-1": 1, "kill-1": "TERM"}, True),  # it was told, and could not save
        ({"code-0": 143, "code-1": 0, "kill-1": "TERM"}, False),  # it was told as it ended
    ],
)
def test_a_start_was_stopped_if_all_its_ranks_were(start, tmp_path, files, crash):
    for name, text in files.items():
        (tmp_path / name).write_text(str(text))
    assert stops(start, 3, 143) == [False, False, crash]


@pytest.mark.parametrize(("end", "counts"), [(0, True), (3600, False)])
def test_a_stop_late_in_a_jobs_time_that_has_got_no_further_counts(start, tmp_path, end, counts):
    """Its time is too short to get anywhere: it would be stopped so for ever."""
    (tmp_path / "end").write_text(time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + end)))
    assert stops(start, 3, 143) == [False, False, counts]


def test_a_post_mortem_is_asked_for_where_ranks_did_not_end_in_order(start, tmp_path):
    """Of what is younger than this start."""
    before, result = int(time.time()), start(1)
    again = f"cd {tmp_path} && sbatch {ASKED} launch/train.sbatch"
    asked = f"<-P><-m><diffusion_trainer.apps.post_mortem><my run><1><{again}><"
    began = int(result.stderr.partition(asked)[2].partition(">")[0])
    assert before <= began <= time.time()
    assert "back into the queue" in result.stderr
    (tmp_path / "doctor-code").write_text("1")
    assert "post_mortem" not in start(1).stderr  # what is left is not of a run that has not begun


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
