"""diffusion-trainer submit: a training run as a job of SLURM, checked before it waits in a queue."""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_trainer.apps import completion, folder_lock, job_script, processes, train
from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import folder as folders
from diffusion_trainer.apps.config import CONF
from diffusion_trainer.apps.job_script import SubmitConfig
from diffusion_trainer.apps.jobs import Slurm
from diffusion_trainer.apps.keys import AS_JOBS, OF_SWEEPS, first
from diffusion_trainer.apps.nodes import hint
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.callbacks.checkpointing import SAVE_SECONDS
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.training import checkpoints
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoints import Checkpoint
from diffusion_trainer.training.resuming import resumable

VERB = "diffusion-trainer submit"
OWN = ("launcher", *SubmitConfig.model_fields)


@dataclass(frozen=True)
class Job:
    """A run that can be submitted: everything has been checked that can be known here."""

    name: str
    folder: Path  # absolute
    text: str  # of its script
    what: str  # it does, in words
    done: int | None  # images that it has seen, if nothing is left of it to do
    dry_run: bool

    @property
    def script(self) -> Path:
        return self.folder / folders.JOB

    def log(self, number: str) -> Path:
        return self.folder / "logs" / f"slurm-{number}.log"

    def write(self) -> Path:
        """The script's place; UserError if a process trains in the folder, or it cannot be written."""
        with folder_lock.held(self.folder):
            (self.folder / "logs").mkdir(exist_ok=True)
            with whole(self.script) as part:
                part.write_text(self.text)
        return self.script


def show(overrides: Sequence[str]) -> str:
    """The configurations of the job and of its run."""
    own, run = split(overrides)
    job = configuration.load("submit", own, SubmitConfig)
    return configuration.dump(job | configuration.load("train", run, TrainConfig))


def check(overrides: Sequence[str]) -> dict:
    """The configurations; UserError for what can be known to fail before it is submitted."""
    own, run = split(overrides)
    job, config = configuration.load("submit", own, SubmitConfig), configuration.load("train", run, TrainConfig)
    wrong = [*job_script.mistakes(job)]
    folder = Path(config["folder"]).resolve()
    if set('\n"\\') & set(str(folder)):
        wrong.append(f"{folder} has a quote, backslash or line break, which sbatch misreads; choose another folder=...")
    if wrong:
        raise UserError("\n".join(wrong))
    tasks, said = job_script.tasks_per_node(job), config["trainer"]["processes"]
    if said not in (None, tasks):
        raise UserError(f"trainer.processes={said}, but the job has tasks_per_node={tasks}: leave the former out")
    _, size = train.processes_of(config, World(0, job["nodes"] * tasks, job["nodes"], slurm=True))
    train.preflight(config, size, Path(config["folder"]))
    _check_lead(job["signal_lead_seconds"], _newest(folder))
    return job | config


def _newest(folder: Path) -> Checkpoint | None:
    return resumable(folder / "checkpoints", Agreement(), thorough=False).checkpoint


def _check_lead(seconds: int, newest: Checkpoint | None) -> None:
    """UserError if the run's last save took longer than there would be between the signal and the end."""
    took = newest.manifest["state"].get(SAVE_SECONDS) if newest else None
    if took is not None and took >= seconds:
        raise UserError(
            f"signal_lead_seconds={seconds} is too short: saving took {took:.0f} s the last time "
            f"({newest.folder}); signal_lead_seconds={math.ceil(2 * took)} would do"
        )


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """submit's overrides and train's; UserError for one of neither."""
    known = [*OWN, *TrainConfig.model_fields, *sorted(p.name for p in CONF.iterdir() if p.is_dir())]
    own, run, wrong = [], [], []
    for text in overrides:
        name = first(text)
        if name in OF_SWEEPS:
            wrong.append(f"{text}: submit does not sweep; {AS_JOBS}")
        elif name not in known:
            wrong.append(f"{text}: neither submit nor train has an option {name}{hint(name, known)}")
        (own if name in OWN else run).append(text)
    if wrong:
        raise UserError("\n".join(wrong))
    if swept := configuration.swept(overrides):
        raise UserError(f"{swept[0]}: several values, submit takes one; {AS_JOBS}")
    return own, run


def prepare(overrides: Sequence[str]) -> Job:
    """The job of overrides of submit and train, checked; nothing is written."""
    config = check(overrides)
    cwd, folder = Path.cwd(), Path(config["folder"]).resolve()
    log = str(folder / "logs").replace("%", "%%") + "/slurm-%j.log"  # sbatch has its own use for %
    again = f"cd {shlex.quote(str(cwd))} && {VERB} {shlex.join(overrides)}"
    lines = job_script.setup(config, sys.executable, cwd, folder, again, split(overrides)[1])
    text = job_script.render(job_script.header(config, config["name"], log), lines)
    done = completion.at_its_end(config, folder)
    return Job(config["name"], folder, text, _what(config, folder), done, config["dry_run"])


def job(overrides: Sequence[str]) -> Path:
    """Where the script of a checked job was written, ready for Slurm.submit."""
    return prepare(overrides).write()


def _what(config: Mapping[str, Any], folder: Path) -> str:
    nodes, tasks = config["nodes"], job_script.tasks_per_node(config)
    on = f"{nodes} node{'s' * (nodes > 1)} x {tasks} process{'es' * (tasks > 1)}"
    where = f" in partition {config['partition']}" if config["partition"] else ""
    newest = checkpoints.latest(folder / "checkpoints")
    return f"{on}{where}, {config['time']} at a time" + (f", resuming from {newest.name}" if newest else "")


def main(overrides: Sequence[str]) -> int:
    """The exit code: 0 submitted, tried (dry_run) or done already."""
    own, _ = split(overrides)
    world, slurm = processes.current(), Slurm()
    if world and world.size > 1:
        raise UserError(f"{world.size} processes were started; submit once, the job starts its processes")
    dry = configuration.load("submit", own, SubmitConfig)["dry_run"]
    if not dry:
        slurm.require()
    job = prepare(overrides)
    if job.done is not None:
        print(f"nothing was submitted: run {job.name} in {job.folder} is done, at {job.done:,} images")
        print("  a larger num_images trains on")
        return 0
    if dry:
        print(job.text)
        print(slurm.rehearse(job.text) if slurm.is_here() else "there is no sbatch on this machine to try it with")
        return 0
    _check_alone(job, slurm)
    slurm.rehearse(job.text)
    _say(job, slurm.submit(job.write()))
    return 0


def _check_alone(job: Job, slurm: Slurm) -> None:
    """UserError if a job of this run waits or runs already."""
    if (there := slurm.of(job.script)) is not None:
        raise UserError(
            f"job {there.number} of run {job.name} in {job.folder} is {there.state} already: watch it (tail -F "
            f"{job.log(there.number)}), or end it first (scancel {there.number}); another run needs another name=..."
        )


def _say(job: Job, number: str) -> None:
    print(
        f"job {number} is submitted: run {job.name} on {job.what}\n"
        f"  folder  {job.folder}\n"
        f"  script  {job.script}\n"
        f"  log     {job.log(number)}\n"
        f"  watch   squeue --job={number}; tail -F {shlex.quote(str(job.log(number)))}\n"
        f"  cancel  scancel {number} (the same command again resumes)"
    )
