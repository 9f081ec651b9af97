"""When launch/train.sbatch puts a job back into the queue, and when no more (tests/slurm has a real SLURM)."""

import functools
import subprocess
import time

import psutil
import pytest
from launching import ASKED, SCRIPT, cluster, requeued, start, stops, with_line  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow


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
    (tmp_path / "replaced").write_text("1")  # while it trains
    result = start(1)
    assert (result.returncode, requeued()) == (1, 0)
    assert "post_mortem" not in result.stderr


@pytest.mark.parametrize(("code", "times"), [(1, 1), (2, 0)])
def test_a_job_that_was_submitted_from_inside_another_counts_its_own_starts(
    start, cluster, requeued, tmp_path, code, times
):
    """sbatch hands on the variables of the job around it, and SLURM sets this one only from the second start on."""
    cluster["SLURM_RESTART_COUNT"] = "2"
    (tmp_path / "restarts").write_text("0")
    assert start(code).returncode == code
    assert requeued() == times


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
def full(cluster, tmp_path):
    """No file can be made any more where the job's are; what is there can still be written to."""
    (tmp_path / "slurm-41234.starts").write_text("none begun\n")
    touch = tmp_path / "tools" / "touch"
    touch.write_text('#!/bin/bash\necho "touch: $1: No space left on device" >&2\nexit 1\n')
    touch.chmod(0o755)


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("code", [143, 138, 140, 129, 130])
def test_stops_are_no_crashes_where_ranks_cannot_leave_a_word_of_them(start, requeued, tmp_path, code):
    assert (stops(start, 5, code), requeued()) == ([False] * 5, 5)
    assert stops(start, 3, 1) == [False, False, True]
    assert not list(tmp_path.glob("slurm-*"))


@pytest.mark.usefixtures("full")
def test_stops_without_a_word_end_too(start, requeued, with_line):
    few = functools.partial(start, script=with_line("max_all=20 ", "max_all=5 "))
    assert (stops(few, 5, 143), requeued()) == ([False] * 4 + [True], 4)


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


def test_a_mistake_that_a_killed_start_has_left_is_not_that_of_this_one(start, tmp_path):
    mistake = tmp_path / "slurm-41234.mistake-0"
    mistake.touch()
    assert start(0).returncode == 0
    assert not mistake.exists()


def test_that_a_killed_start_was_told_to_stop_is_no_word_of_this_one(start, cluster, tmp_path):
    cluster["DOCTOR"] = "false"
    told = [tmp_path / f"slurm-41234.stopped-0-{rank}" for rank in range(2)]
    for last in (False, False, True):
        for path in told:
            path.touch()
        assert stops(start, 1, 1) == [last]


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


def test_a_job_that_is_not_to_be_put_back_ends_at_once_and_says_how_to_resume(start, requeued, tmp_path):
    (tmp_path / "requeues").write_text("0")
    result = start(1)
    assert (result.returncode, requeued()) == (1, 0)
    assert "exit code 1: submitted with --no-requeue. Resume: cd " in result.stderr


def test_nothing_outlives_a_script_that_is_killed_as_it_asks_how_the_job_is(cluster, tmp_path):
    """SLURM may miss what is forked in that moment, and its answer has no reader."""
    (tmp_path / "code").write_text("1")
    (tmp_path / "slow").touch()
    script = subprocess.Popen(["bash", SCRIPT], env=cluster, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "asked").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    left = psutil.Process(script.pid).children(recursive=True)
    assert left
    script.kill()
    script.wait()
    assert not psutil.wait_procs(left, timeout=20)[1]
