"""diffusion-trainer doctor: what would stop or slow down a run, found in a minute, each with how to mend it."""

import faulthandler
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import processes
from diffusion_trainer.apps.doctor_disk import Folder, Saving, SharedMemory, TemporaryFiles
from diffusion_trainer.apps.doctor_facts import Run
from diffusion_trainer.apps.doctor_machine import Clock, Cores, Memory, OpenFiles, Versions
from diffusion_trainer.apps.doctor_run import Batch, Config, Shards, WeightsAndBiases, refused
from diffusion_trainer.apps.doctor_speed import AllReduce, Devices, Matmul, Wires
from diffusion_trainer.apps.findings import Check, Failed, Finding, Process, examine, judge, screen
from diffusion_trainer.apps.meeting import Absent, meeting, node_name
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.apps.processes import World
from diffusion_trainer.apps.rank import quiet
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.training.agreement import Agreement

MEETING_SECONDS = 25  # that the first process waits for the others, once it has looked at the configuration
LAST_SECONDS = 5  # for the reports, after the time for measuring is up; then the process ends, whatever it waits for


class DoctorConfig(TrainConfig):
    doctor: dict
    out: str | None


@dataclass(frozen=True)
class Settings:
    """See conf/doctor.yaml."""

    processes: int | None = None
    slow: float = 0.8
    slow_network: float = 0.5
    clock_seconds: float = 1.0
    signal_lead_seconds: float = 120.0
    timeout_seconds: float = 50.0

    def __post_init__(self):
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be positive or null, not {self.processes}")
        if not (0 < self.slow <= 1 and 0 < self.slow_network <= 1):
            raise ValueError(f"slow and slow_network are shares in (0, 1], not {self.slow} and {self.slow_network}")
        if not (min(self.clock_seconds, self.signal_lead_seconds, self.timeout_seconds) > 0):
            raise ValueError("clock_seconds, signal_lead_seconds and timeout_seconds must be positive")


def show(overrides: Sequence[str]) -> str:
    """The configuration that main would run with."""
    return configuration.dump(check(overrides))


def check(overrides: Sequence[str]) -> dict:
    """The configuration; UserError for what is wrong in itself."""
    return configuration.load("doctor", overrides, DoctorConfig)


def main(overrides: Sequence[str]) -> int:
    """The exit code: 0 nothing but warnings, 2 train would refuse to start, 1 another error. Processes that do not find
    each other in time are a warning: the run's have half an hour to start.
    """
    quiet()
    begin = time.monotonic()
    config = check(overrides)
    settings: Settings = build(config.pop("doctor"), "doctor")
    out, world = config.pop("out"), processes.current() or World(0, 1, 1, False)
    last = settings.timeout_seconds + LAST_SECONDS
    try:
        with bounded(last) if world.size > 1 else nullcontext():
            run = Run(config, processes.current(), settings.processes)
            checks = checks_of(run, refused(run, world.rank), settings)
            agreement = meeting(world, MEETING_SECONDS, last)
            reports = _reports(checks, agreement, begin + settings.timeout_seconds)
    except Absent as absent:
        if str(absent):
            print(f"warning: the doctor has not looked: {absent}", file=sys.stderr)
        return 0
    findings = judge(checks, reports)
    if world.rank == 0:
        seconds = time.monotonic() - begin
        print(screen(findings, _title(config, reports, seconds)), flush=True)
        if out:
            _write(Path(out), findings, reports, seconds)
    return max(finding.exit_code for finding in findings)


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Ends the process with exit code 1 and its stacks if what is inside takes longer: a collective can."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def checks_of(run: Run, found: Any, settings: Settings) -> list[Check]:
    """All of them, as they are made and shown. A slow process holds up the others only where they need each other."""
    return [
        Versions(),
        Clock(settings.clock_seconds),
        Devices(run),
        Matmul(run, settings.slow),
        AllReduce(run),
        Wires(settings.slow_network),
        Batch(run),
        Shards(run),
        Config(found),
        Cores(run),
        Memory(run),
        OpenFiles(),
        TemporaryFiles(run.config["compile"]),
        SharedMemory(run),
        WeightsAndBiases(run),
        Saving(run, settings.signal_lead_seconds),
        Folder(run),
    ]


Reports = Sequence[tuple[Process, Mapping[str, Any]]]  # by rank: what each check measured there


def _reports(checks: Sequence[Check], agreement: Agreement, end: float) -> Reports:
    """end: of time.monotonic(), for the checks; the earliest of all processes'."""
    try:
        nodes, left = zip(*agreement.gather((node_name(), end - time.monotonic())), strict=True)
        end = time.monotonic() + min(left)
        last = Agreement(max(1, int(min(left))) + LAST_SECONDS)  # in the other, checks given up may still wait
        leaders = tuple(nodes.index(node) for node in dict.fromkeys(nodes))
        here = Process(agreement.rank, nodes[agreement.rank], leaders)
        measured = examine(checks, here, agreement, lambda: end - time.monotonic())
        return last.gather((here, measured))
    except RuntimeError as error:  # of the collectives: what a check raises is its finding
        raise Absent(
            f"the processes no longer answer each other ({str(error).splitlines()[0]}); look into the log for the one "
            "that ended"
        ) from error


def _title(config: Mapping[str, Any], reports: Reports, seconds: float) -> str:
    nodes = dict.fromkeys(process.node for process, _ in reports)
    count = f"{len(reports)} process{'es' if len(reports) > 1 else ''}"
    where = next(iter(nodes)) if len(nodes) == 1 else f"{len(nodes)} nodes"
    return f"doctor: {config['name']} in {config['folder']}, looked at by {count} on {where} in {seconds:.0f} s"


def _write(path: Path, findings: Sequence[Finding], reports: Reports, seconds: float) -> None:
    report = {
        "exit_code": max(finding.exit_code for finding in findings),
        "seconds": seconds,
        "findings": [asdict(finding) for finding in findings],
        "processes": [{"rank": p.rank, "node": p.node, "measured": _plain(measured)} for p, measured in reports],
    }
    try:
        with whole(path) as part:
            part.write_text(json.dumps(report, indent=1))
    except OSError as problem:
        raise UserError(f"out={path} cannot be written ({problem}); choose another out=...") from problem


def _plain(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(value) if isinstance(value, Failed) else value for name, value in measured.items()}
