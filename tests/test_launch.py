"""What launch/train.sbatch starts, with stand-ins for SLURM's commands (tests/slurm runs it on a real one)."""

import subprocess
import time

import pytest
from launching import ASKED, cluster, requeued, start, with_line  # noqa: F401 (fixtures)

pytestmark = pytest.mark.slow


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


def test_several_jobs_at_once_for_one_run_are_refused(start, cluster):
    cluster["SLURM_ARRAY_JOB_ID"] = "41230"
    result = start(0)
    assert (result.returncode, result.stdout) == (2, "")
    assert "no array" in result.stderr


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


def test_a_post_mortem_is_asked_for_where_ranks_did_not_end_in_order(start, tmp_path):
    """Of what is younger than this start."""
    before, result = time.monotonic(), start(1)
    again = f"cd {tmp_path} && sbatch {ASKED} launch/train.sbatch"
    asked = f"<-P><-m><diffusion_trainer.apps.post_mortem><my run><1><{again}><"
    seconds = int(result.stderr.partition(asked)[2].partition(">")[0])
    assert 0 <= seconds <= time.monotonic() - before + 1
    assert "back into the queue" in result.stderr
    (tmp_path / "doctor-code").write_text("1")
    assert "post_mortem" not in start(1).stderr  # what is left is not of a run that has not begun
