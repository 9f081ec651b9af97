"""A job's script: launch/train.sbatch, its header and set-up written for one run. The rest stands there alone."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_trainer.apps.config import CONF
from diffusion_trainer.apps.nodes import Schema
from diffusion_trainer.callbacks.redaction import NAME, REFERENCE, strings

TEMPLATE = CONF.parent / "launch" / "train.sbatch"
BEGIN, END = "# Set-up\n", "# End of the set-up\n"
LONGEST_SIGNAL_LEAD = 65535  # that SLURM takes
MINUTES_OF_A_DAY = 1440
OURS = {  # sbatch's names -> what says it here
    "job-name": "name", "nodes": "nodes", "ntasks-per-node": "tasks_per_node", "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node", "partition": "partition", "account": "account", "qos": "qos", "time": "time",
    "signal": "signal_lead_seconds",
}  # fmt: skip
FIXED = ("output", "error", "open-mode", "requeue", "no-requeue", "array", "wrap", "ntasks", "parsable")
UNSAFE = r"[^\w./+=,@:%-]"  # characters that sbatch may read as something else


class SubmitConfig(Schema):
    """The top level of conf/submit.yaml."""

    dry_run: bool
    nodes: int
    gpus_per_node: int | None
    tasks_per_node: int | None
    cpus_per_task: int
    partition: str | None
    account: str | None
    qos: str | None
    time: int | str
    signal_lead_seconds: int
    max_starts: int
    doctor: bool
    python: str | None
    container: str | None
    environment: dict
    modules: list[str]
    setup: list[str]
    sbatch_options: dict


def tasks_per_node(config: Mapping[str, Any]) -> int:
    return config["tasks_per_node"] or config["gpus_per_node"] or 1


def header(config: Mapping[str, Any], name: str, log: str) -> dict[str, Any]:
    """sbatch's options in the order of the template; None is left out, True has no value.

    log: %j in it is the job's number.
    """
    return {
        "job-name": re.sub(f"{UNSAFE}+", "_", name),  # only for people who look at the queue
        "nodes": config["nodes"],
        "ntasks-per-node": tasks_per_node(config),
        "cpus-per-task": config["cpus_per_task"],
        "gpus-per-node": config["gpus_per_node"],
        "partition": config["partition"],
        "account": config["account"],
        "qos": config["qos"],
        "time": config["time"],
        "output": log,
        "open-mode": "append",
        "signal": f"TERM@{config['signal_lead_seconds']}",
        "requeue": True,
        **config["sbatch_options"],
    }


def setup(
    config: Mapping[str, Any], python: str, cwd: Path, folder: Path, again: str, arguments: Sequence[str]
) -> list[str]:
    """Lines of bash. again: the command that submits this run; arguments: those of train."""
    command = f"{config['container'] or ''} {shlex.quote(config['python'] or python)}".strip()
    return [
        *config["setup"],
        *(f"module load {shlex.quote(name)}" for name in config["modules"]),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in config["environment"].items()),
        f"cd {shlex.quote(str(cwd))}",
        f"python=({command})",
        f"max_starts={config['max_starts']}",
        f"doctor={str(config['doctor']).lower()}",
        f"lead={config['signal_lead_seconds']}",
        f"folder={shlex.quote(str(folder))}",
        f"files={shlex.quote(str(folder / 'logs'))}/slurm-$SLURM_JOB_ID",
        f"again={shlex.quote(again)}",
        " \\\n  ".join(["set --", *map(shlex.quote, arguments)]),
    ]


def render(options: Mapping[str, Any], lines: Sequence[str]) -> str:
    """The template with this header and this set-up, without the comment for those who read it in the checkout."""
    text = TEMPLATE.read_text()
    body = text[text.rindex("#SBATCH") :].split("\n", 1)[1]
    before, rest = body.split(BEGIN)
    after = rest.split(END)[1]
    said = {name: value for name, value in options.items() if value is not None and value is not False}  # 0 is a value
    given = "".join(f"{_directive(name, value)}\n" for name, value in said.items())
    return "".join(["#!/bin/bash\n", given, before, BEGIN, *(f"{line}\n" for line in lines), END, after])


def _directive(name: str, value: Any) -> str:
    if value is True:
        return f"#SBATCH --{name}"
    text = str(value)
    return f"#SBATCH --{name}=" + (f'"{text}"' if re.search(UNSAFE, text) else text)


def seconds_of(time: int | str) -> int | None:
    """SLURM's ways to say a time: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]; None: none
    of them.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time))
    if not match:
        return None
    days, *parts = (int(part) if part else None for part in match.groups())
    given = [part for part in parts if part is not None]
    if days is None and len(given) < 3:
        given = [0, *given]
    hours, minutes, seconds = [*given, 0, 0][:3]
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the job, whatever it runs; each with what would be right."""
    for key in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "max_starts", "signal_lead_seconds"):
        if config[key] is not None and config[key] < 1:
            raises = " or null" if key in ("gpus_per_node", "tasks_per_node") else ""
            yield f"{key} must be positive{raises}, not {config[key]}"
    gpus, tasks = config["gpus_per_node"], config["tasks_per_node"]
    if gpus and tasks and gpus != tasks:
        yield f"tasks_per_node={tasks} and gpus_per_node={gpus}: each process has one GPU; leave tasks_per_node out"
    yield from _mistakes_of_time(config["time"], config["signal_lead_seconds"])
    yield from _mistakes_of_options(config)
    yield from _mistakes_of_environment(config["environment"])
    try:
        shlex.split(config["container"] or "")
    except ValueError as error:
        yield f"container={config['container']}: {error}"
    for key in ("container", "python"):
        if "\n" in (config[key] or ""):
            yield f"{key} must be one line"
    for key, text in strings({key: config[key] for key in ("setup", "environment", "container")}):
        if REFERENCE.search(text):
            yield f"{key}: secrets are not written into files; say '$NAME' in setup, which the job's shell reads"


def _mistakes_of_time(time: int | str, lead: int) -> Iterator[str]:
    seconds = seconds_of(time)
    if seconds is None:
        yield f"time={time} is no time: say minutes, hours:minutes:seconds or days-hours, as time=04:00:00"
    elif isinstance(time, int) and time >= MINUTES_OF_A_DAY:
        yield (
            f"time={time} would be minutes. YAML reads 24:00:00 without quotes as 86400: in a file say it in quotes, "
            f"time: '24:00:00'; minutes of a day or more as days-hours, as time=2-00"
        )
    elif lead >= min(seconds or LONGEST_SIGNAL_LEAD + 1, LONGEST_SIGNAL_LEAD + 1):  # a time of 0 is no limit
        yield (
            f"signal_lead_seconds={lead} must be shorter than time={time} ({seconds} s) and at most "
            f"{LONGEST_SIGNAL_LEAD}: the job would be told to stop as soon as it starts"
        )


def _mistakes_of_options(config: Mapping[str, Any]) -> Iterator[str]:
    for name, value in config["sbatch_options"].items():
        if name in OURS:
            yield f"sbatch_options.{name}: say {OURS[name]}={value}"
        elif name in FIXED:
            yield f"sbatch_options.{name}: it is not to be changed, the script leans on it"
        elif not re.fullmatch(r"[a-z][a-z-]*", name):
            yield f"sbatch_options.{name}: write the option's long name without dashes before it"
    named = {**{key: config[key] for key in ("partition", "account", "qos")}, **config["sbatch_options"]}
    for name, value in named.items():
        if re.search(r"[\n\"\\]", str(value)) or isinstance(value, dict | list):
            yield f"{name}={value}: an option is one line without quotes or backslashes"


def _mistakes_of_environment(environment: Mapping[str, Any]) -> Iterator[str]:
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"environment.{name}: a variable's name has letters, digits and _ only"
        elif NAME.search(name):
            yield f"environment.{name}: secrets are not written into files; export it in the shell that submits"
        elif isinstance(value, dict | list | None | bool):
            yield f"environment.{name}={value}: quote the text that it is to be"
