"""A job's script is launch/train.sbatch, and bash reads in it just what submit was told."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import job_script
from diffusion_trainer.apps.config import CONF
from diffusion_trainer.apps.job_script import BEGIN, END, TEMPLATE, SubmitConfig
from diffusion_trainer.apps.parts import TrainConfig

LAUNCHERS = sorted(path.stem for path in (CONF / "launcher").glob("*.yaml"))
NASTY = ["name=a b", "x='quoted' \"twice\"", "y=$HOME `id` $(id)", "z=two\nlines", "w=back\\slash # no comment", ""]


def config(*overrides, **more):
    return configuration.load("submit", overrides, SubmitConfig) | more


def script(config, arguments=("experiment=digits",), folder=Path("/runs/digits")):
    lines = job_script.setup(config, "/env/bin/python", Path("/"), folder, "submit it again", arguments)
    return job_script.render(job_script.header(config, "digits", f"{folder}/logs/slurm-%j.log"), lines)


def directives(text):
    return [line for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_nothing_but_header_and_setup_differs_from_the_plain_script():
    ours, plain = script(config()), TEMPLATE.read_text()
    assert ours.split(END)[1] == plain.split(END)[1]
    assert len(ours.split(END)[1].splitlines()) > 30
    end_of_header = [text[: text.index(BEGIN)].splitlines()[-1] for text in (ours, plain)]
    assert end_of_header == ["set -eo pipefail"] * 2


def test_the_header_of_the_plain_script_is_that_of_the_defaults():
    own = ("--job-name=", "--output=")
    ours, plain = (
        [line for line in directives(text) if not any(name in line for name in own)]
        for text in (script(config()), TEMPLATE.read_text())
    )
    assert ours == plain


def test_what_is_given_is_in_the_header():
    text = script(
        config(
            "nodes=3", "gpus_per_node=8", "cpus_per_task=12", "partition=main", "account=me", "qos=long",
            "time=1-12", "signal_lead_seconds=600", "+sbatch_options.constraint='a100 & ib'",
            "+sbatch_options.exclusive=true",
        )
    )  # fmt: skip
    assert directives(text) == [
        "#SBATCH --job-name=digits", "#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=8", "#SBATCH --cpus-per-task=12",
        "#SBATCH --gpus-per-node=8", "#SBATCH --partition=main", "#SBATCH --account=me", "#SBATCH --qos=long",
        "#SBATCH --time=1-12", "#SBATCH --output=/runs/digits/logs/slurm-%j.log", "#SBATCH --open-mode=append",
        "#SBATCH --signal=TERM@600", "#SBATCH --requeue", '#SBATCH --constraint="a100 & ib"', "#SBATCH --exclusive",
    ]  # fmt: skip


def test_none_and_false_are_left_out_and_zero_is_not():
    lines = directives(script(config("time=0", "+sbatch_options.mem=0", "+sbatch_options.exclusive=false")))
    assert [line for line in lines if "time" in line or "mem" in line] == ["#SBATCH --time=0", "#SBATCH --mem=0"]
    assert not any("exclusive" in line or "partition" in line for line in lines)


def test_a_name_that_sbatch_would_misread_is_only_shortened_in_the_queue():
    options = job_script.header(config(), 'lr=1e-3/a "b"\n#SBATCH --uid=0', "log")
    assert options["job-name"] == "lr=1e-3/a_b_SBATCH_--uid=0"


def read_by_bash(text, show):
    """The output of a line of bash after the script's set-up, with a `module` that says what it is asked for."""
    lines = text[: text.index(END)]
    before = 'module() { echo "module $*"; }\n'
    done = subprocess.run(["bash", "-c", f"{before}{lines}{show}"], env={"SLURM_JOB_ID": "9"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_bash_reads_just_the_arguments_that_were_given():
    shown = read_by_bash(script(config(), NASTY), r'printf "%s\0" "$@"')
    assert shown.split("\0") == [*NASTY, ""]


def test_variables_modules_and_lines_of_setup_come_before_the_run():
    environment = {"PLAIN": "ib0", "NASTY": "a b $HOME 'c' \"d\"", "NUMBER": 3}
    job = config("modules=[cuda/12.4,gcc]", "setup=['ulimit -n 1000']", environment=environment)
    shown = read_by_bash(script(job), "ulimit -n; printenv PLAIN NASTY NUMBER")
    assert shown == "module load cuda/12.4\nmodule load gcc\n1000\nib0\na b $HOME 'c' \"d\"\n3\n"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), ["/env/bin/python"]),
        (("python='/my env/python'",), ["/my env/python"]),
        (("container='apptainer exec --nv i.sif'",), ["apptainer", "exec", "--nv", "i.sif", "/env/bin/python"]),
        (("container='apptainer exec i.sif'", "python=python3"), ["apptainer", "exec", "i.sif", "python3"]),
    ],
)
def test_python_runs_inside_the_container(overrides, words):
    assert read_by_bash(script(config(*overrides)), r'printf "%s\n" "${python[@]}"').splitlines() == words


def test_the_doctor_comes_first_unless_he_is_not_wanted():
    show = 'echo "$doctor $lead"'
    assert read_by_bash(script(config("signal_lead_seconds=300")), show) == "true 300\n"
    assert read_by_bash(script(config("doctor=false")), show) == "false 120\n"


def test_the_plain_script_tells_the_doctor_the_lead_that_its_header_has():
    (lead,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", TEMPLATE.read_text(), re.MULTILINE)
    assert f"\nlead=${{LEAD:-{lead}}} " in TEMPLATE.read_text()


def test_logs_and_counters_are_in_the_runs_folder():
    folder = Path("/runs/it's mine")
    shown = read_by_bash(script(config(), folder=folder), 'echo "$folder"; echo "$files"; echo "$again"')
    assert shown.splitlines() == [str(folder), f"{folder}/logs/slurm-9", "submit it again"]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (90, 5400), ("90", 5400), ("90:30", 5430), ("04:00:00", 14400), ("1-12", 129600), ("1-12:30", 131400),
        ("1-12:30:15", 131415), ("0", 0), ("4h", None), ("1-", None), ("1:2:3:4", None), ("", None), (-5, None),
    ],
)  # fmt: skip
def test_times_are_those_of_sbatch(time, seconds):
    assert job_script.seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"nodes": 0}, "nodes must be positive, not 0"),
        ({"gpus_per_node": -1}, "gpus_per_node must be positive or null, not -1"),
        ({"gpus_per_node": 8, "tasks_per_node": 4}, "leave tasks_per_node out"),
        ({"time": "4h"}, "time=4h is no time: say minutes, hours:minutes:seconds"),
        ({"time": 2, "signal_lead_seconds": 120}, "signal_lead_seconds=120 must be shorter than time=2 (120 s)"),
        ({"time": 0, "signal_lead_seconds": 65536}, "at most 65535"),
        ({"time": yaml.safe_load("24:00:00")}, "in a file say it in quotes, time: '24:00:00'"),
        ({"time": yaml.safe_load("30:00")}, "time=1800 would be minutes"),
        ({"sbatch_options": {"nodes": 2}}, "sbatch_options.nodes: say nodes=2"),
        ({"sbatch_options": {"gpus-per-node": 2}}, "sbatch_options.gpus-per-node: say gpus_per_node=2"),
        ({"sbatch_options": {"output": "x"}}, "sbatch_options.output: it is not to be changed"),
        ({"sbatch_options": {"--exclusive": True}}, "write the option's long name without dashes"),
        ({"partition": "a\nb"}, "an option is one line"),
        ({"container": "apptainer 'exec"}, "container=apptainer 'exec: No closing quotation"),
        ({"container": "a\nb"}, "container must be one line"),
        ({"environment": {"a b": 1}}, "environment.a b: a variable's name has letters"),
        ({"environment": {"WANDB_API_KEY": "x"}}, "secrets are not written into files"),
        ({"environment": {"A": None}}, "quote the text that it is to be"),
    ],
)
def test_mistakes_are_told_with_what_would_be_right(more, says):
    found = "\n".join(job_script.mistakes(config(**more)))
    assert says in found


@pytest.mark.parametrize("time", ["24:00:00", "2880", "2-00", 1439])
def test_times_that_say_what_they_are_are_none(time):
    assert [*job_script.mistakes(config(time=time))] == []


def test_a_time_without_limit_ends_before_no_lead():
    assert [*job_script.mistakes(config(time=0))] == []


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_of_conf_is_a_job(name):
    job = config(f"launcher={name}")
    assert [*job_script.mistakes(job)] == []
    given = yaml.safe_load((CONF / "launcher" / f"{name}.yaml").read_text())
    assert {key: job[key] for key in given} == given
    assert f"#SBATCH --time={given['time']}" in directives(script(job))


def test_the_command_line_overrides_the_launcher():
    assert config("launcher=gpu_nodes", "gpus_per_node=4")["gpus_per_node"] == 4


def test_no_option_of_submit_is_one_of_train():
    groups = {path.name for path in CONF.iterdir() if path.is_dir()} - {"launcher"}
    assert not {"launcher", *SubmitConfig.model_fields} & {*TrainConfig.model_fields, *groups}
