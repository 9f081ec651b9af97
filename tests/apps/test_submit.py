"""diffusion-trainer submit, with stand-ins for SLURM's commands: what is submitted, and what is refused before it."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import tiny
from conftest import ROOT
from stand_ins import Commands
from written_runs import config_of, write_run

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps import folder_lock, job_script, submit
from diffusion_trainer.apps.jobs import GONE, OVER, UNKNOWN, Slurm, _directives
from diffusion_trainer.callbacks.checkpointing import SAVE_SECONDS
from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.checkpoint_files import MANIFEST, write_manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Arguments of a run of train that two processes can do."""
    return [*tiny.overrides(tmp_path_factory.mktemp("shards")), *tiny.NETWORK]


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Commands:
    """Stand-ins on PATH, in front of an empty folder to work in."""
    for name in ("tools", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    return Commands(tmp_path / "tools")


@pytest.fixture
def refused(slurm):
    """refused(*arguments) -> the message; nothing was submitted, nor written."""

    def refused(*arguments: str) -> str:
        before = sorted(Path().rglob("*"))
        with pytest.raises(UserError) as error:
            console.run(["submit", *arguments])
        assert slurm.read("submitted") is None
        assert sorted(Path().rglob("*")) == before
        return str(error.value)

    return refused


def test_a_job_is_submitted_and_says_where_to_look(slurm, run, capsys):
    assert console.run(["submit", "nodes=2", *run]) == 0
    folder = Path("runs/digits").absolute()
    script = folder / "job.sbatch"
    options = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--nodes=2" in options
    assert slurm.read("submitted") == " ".join(["--parsable", *options, f"{script}\n"])
    assert slurm.read("rehearsed") == script.read_text() == submit.prepare(["nodes=2", *run]).text
    shown = capsys.readouterr().out
    assert "job 4711 is submitted: run digits on 2 nodes x 1 process, 04:00:00 at a time\n" in shown
    for line in (f"folder  {folder}", f"script  {script}", f"log     {folder}/logs/slurm-4711.log", "scancel 4711"):
        assert line in shown
    assert (folder / "logs").is_dir()  # where SLURM writes before anything of ours runs


def test_the_folder_of_a_job_that_waits_is_still_free_for_its_run(slurm, run):
    console.run(["submit", *run])
    folders.check(Path("runs/digits"), config_of(run))
    assert console.run(["submit", *run]) == 0


def test_a_run_that_has_begun_is_resumed_and_one_that_is_done_is_not_submitted(slurm, run, capsys):
    run = [*run, "callbacks.evaluate=null"]
    more = ["evaluation=none", "num_images=64"]
    write_run(Path("runs/digits"), config_of(run, *more), images=32)
    console.run(["submit", *run, *more])
    assert "resuming from images-000000000032" in capsys.readouterr().out
    os.remove(slurm.folder / "submitted")
    assert console.run(["submit", *run, "num_images=32"]) == 0
    assert "nothing was submitted" in (shown := capsys.readouterr().out)
    assert "is done, at 32 images" in shown
    assert slurm.read("submitted") is None


def test_another_configuration_in_the_folder_is_refused_with_the_difference(refused, run):
    write_run(Path("runs/digits"), config_of(run, "num_images=64"), images=32)
    message = refused(*run, "num_images=64", "optimizer.lr=0.5")
    assert "holds another run; its configuration differs:\n  optimizer.lr: 0.002 there, 0.5 here" in message


def test_the_folder_of_a_sweep_is_named_as_one(slurm, run):
    Path("runs/digits").mkdir(parents=True)
    Path("runs/digits/sweep.json").write_text("{}")
    for verb in ("submit", "train"):
        with pytest.raises(
            UserError, match=r"runs/digits is the folder of a sweep, with its runs in it; choose another"
        ):
            console.run([verb, *run, "strategy=single"])


def test_a_signal_that_leaves_less_time_than_the_last_save_took_is_refused(refused, slurm, run):
    _, checkpoint = write_run(Path("runs/digits"), config_of(run, "num_images=64"), images=32)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["crc32"]
    write_manifest(checkpoint, manifest | {"state": {SAVE_SECONDS: 150.0}})
    message = refused(*run, "num_images=64")
    assert "signal_lead_seconds=120 is too short: saving took 150 s the last time" in message
    assert "signal_lead_seconds=300 would do" in message
    assert console.run(["submit", *run, "num_images=64", "signal_lead_seconds=300"]) == 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["nodse=2"], "nodse=2: neither submit nor train has an option nodse; did you mean nodes?"),
        (["optimzer.lr=1"], "did you mean optimizer?"),
        (
            ["optimizer.lr=1e-3,2e-3"],
            "optimizer.lr=1e-3,2e-3: several values, submit takes one; points of a sweep as jobs: ",
        ),
        (["nodes=1,2"], "diffusion-trainer train -m key=a,b hydra/launcher=slurm"),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm: submit does not sweep; points of a sweep as jobs: "),
        (["sweeper=tpe"], "sweeper=tpe: submit does not sweep; points of a sweep as jobs: "),
        (["nodes=two"], "nodes=two: input should be a valid integer"),
        (["launcher=here"], "launcher=here: there is no such option; launcher is one of"),
        (["environment.A=1"], "there is no option environment.A"),
        (["time=4h", "nodes=0"], "time=4h is no time"),
        (["time=4h", "nodes=0"], "nodes must be positive"),
        (["optimizer.lrr=1"], "did you mean optimizer.lr?"),
        (["nodes=3"], "batch_size=32 does not divide over 3 processes"),
        (["nodes=2", "gpus_per_node=8", "lanes=8"], "lanes=8 must divide batch_size=32 and be a multiple of the 16"),
        (["nodes=2", "strategy=single"], "2 processes were started, this strategy has 1; use strategy=ddp"),
        (
            ["tasks_per_node=2", "trainer.processes=1"],
            "trainer.processes=1, but the job has tasks_per_node=2: leave the former out",
        ),
        (["data.shards=elsewhere/*.tar"], "elsewhere"),
        (["folder='a\"b'"], "choose another folder=..."),
    ],
)
def test_what_would_fail_is_refused_before(refused, run, overrides, says):
    assert says in refused(*run, *overrides)


def test_a_partition_that_there_is_not_is_told_with_those_that_there_are(refused, slurm, run):
    slurm.write("refusal", "sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition\n")
    assert refused(*run, "partition=x") == (
        "sbatch: invalid partition specified: x; Invalid partition\n"
        "partitions here: main (up to 1-00:00:00, 2 nodes), debug (up to 30:00, 1 node)"
    )


def test_the_reason_of_a_refusal_is_told_without_the_partitions_too(refused, slurm, run):
    slurm.write("refusal", "sbatch: error: Batch job submission failed: Socket timed out\n")
    (slurm.folder / "sinfo").write_text("#!/bin/bash\necho sinfo: error: down >&2; exit 1\n")
    assert refused(*run) == "sbatch: Batch job submission failed: Socket timed out"


@pytest.mark.parametrize(
    "words",
    [
        "error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\\nsqueue: fatal: Could not establish a "
        "configuration source",
        "error: slurm_load_jobs: Unable to contact slurm controller (connect failure)",
    ],
)
def test_where_no_cluster_answers_the_commands_this_is_told_beside_their_words(refused, slurm, run, words):
    (slurm.folder / "squeue").write_text(f"#!/bin/bash\nprintf 'squeue: {words}\\n' >&2; exit 1\n")
    said, advice = refused(*run).splitlines()
    assert said.startswith("squeue: ")
    assert said.endswith(words.rsplit(": ", 1)[1])
    assert "no cluster answers them" in advice
    assert "SLURM_CONF" in advice


def test_a_job_of_the_same_run_that_waits_or_runs_is_named(refused, slurm, run):
    script = Path("my runs/digits/job.sbatch").absolute()
    slurm.write("queue", f"11|RUNNING|/elsewhere/job.sbatch\n12|PENDING|{script}\n")
    message = refused(*run, "folder='my runs/digits'")
    assert "job 12 of run digits" in message
    assert "is PENDING already" in message
    assert "scancel 12" in message


def test_a_job_of_another_run_is_in_nobodys_way(slurm, run):
    slurm.write("queue", f"12|PENDING|{Path('runs/digits').absolute()}-2/job.sbatch\n")
    assert console.run(["submit", *run]) == 0


def test_a_run_that_trains_here_is_not_submitted_as_well(slurm, run):
    with folder_lock.held(Path("runs/digits")), pytest.raises(UserError, match="another process is training in"):
        console.run(["submit", *run])
    assert slurm.read("submitted") is None


def test_without_slurm_the_way_out_is_told_at_once(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refused("experiment=there_is_none")
    assert "there is no sbatch on this machine" in message
    assert "diffusion-trainer train" in message


def test_a_dry_run_shows_the_script_and_what_sbatch_says_and_writes_nothing(slurm, run, capsys):
    assert console.run(["submit", "dry_run=true", "nodes=2", *run]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in shown
    assert shown.endswith("Job 7 to start at noon\n")
    assert slurm.read("submitted") is None
    assert list(Path().iterdir()) == []


def test_a_dry_run_needs_no_slurm(slurm, run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert console.run(["submit", "dry_run=true", *run]) == 0
    assert "#SBATCH --nodes=1\n" in (shown := capsys.readouterr().out)
    assert "there is no sbatch on this machine" in shown


def test_a_job_is_no_part_of_the_job_that_it_is_submitted_from(slurm, run, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS", "MINE"):
        monkeypatch.setenv(name, "1")
    console.run(["submit", *run])
    names = {line.split("=")[0] for line in slurm.read("environment").splitlines()}
    assert {n for n in names if n.startswith("SLURM_")} == {"SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS"}
    assert "MINE" in names


def test_the_options_of_a_script_are_given_on_the_command_line_too_as_they_are_read_there():
    """SBATCH_PARTITION and its like overrule a script, and not the command line."""
    options = {"constraint": "a100 & ib", "exclusive": True, "comment": "it's $HOME"}
    text = job_script.render(
        options, ["#SBATCH --time=1", "set -- 'a", "#SBATCH --time=2'"]
    )  # sbatch does not look so far
    assert _directives(text) == ["--constraint=a100 & ib", "--exclusive", "--comment=it's $HOME"]


def test_job_renders_one_command_into_a_script(slurm, run):
    path = submit.job(["nodes=2", *run, "name=point", "folder=sweep/point"])
    assert path == Path("sweep/point/job.sbatch").absolute()
    assert "name=point \\\n  folder=sweep/point\n" in path.read_text()


def test_help_lists_the_options_of_both(capsys):
    assert console.run(["submit", "--help"]) == 0
    shown = capsys.readouterr().out
    for text in ("signal_lead_seconds: 120", "launcher=gpu_nodes", "num_images: 1000000", "schedule=cosine"):
        assert text in shown


PAGES = [ROOT / "README.md", ROOT / "docs" / "slurm.md", *(ROOT / "launch").iterdir()]
SHOWN = sorted(
    {c for p in PAGES if p.is_file() for c in re.findall(r"diffusion-trainer submit ([^`\n\"]+)", p.read_text())}
)


@pytest.mark.parametrize("command", [c for c in SHOWN if "..." not in c and "--help" not in c])
def test_every_command_shown_is_one(command):
    submit.show(shlex.split(command))


def test_there_are_commands_shown():
    assert len(SHOWN) >= 3


def test_config_shows_both(capsys, run):
    assert console.run(["submit", "--config", "nodes=2", *run]) == 0
    shown = capsys.readouterr().out
    assert "nodes: 2\n" in shown
    assert "batch_size: 32\n" in shown


@pytest.mark.parametrize(
    ("job", "complaint", "state"),
    [
        ("JobId=7 JobName=a JobState=RUNNING Reason=None ExitCode=0:0\n", "", "RUNNING"),
        ("JobId=7 JobName=a JobState=PREEMPTED Reason=None ExitCode=0:15\n", "", "PREEMPTED"),
        (None, "slurm_load_jobs error: Invalid job id specified\n", GONE),
        (None, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", UNKNOWN),
    ],
)
def test_the_state_of_a_job(slurm, job, complaint, state):
    slurm.write("complaint", complaint)
    if job:
        slurm.write("job", job)
    assert Slurm().state("7") == state
    assert (state in OVER) == (state in (GONE, "PREEMPTED"))
