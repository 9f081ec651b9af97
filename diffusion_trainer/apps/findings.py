"""What `diffusion-trainer doctor` finds: measured by each process, judged from all processes' numbers at once."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.agreement import Agreement

SHOWN = 4  # nodes that one line names
WIDTH = 11  # of a check's name


@dataclass(frozen=True)
class Finding:
    """One line of the report. nodes: where; empty for the run as a whole."""

    check: str
    status: str  # ok, warning or error
    value: str  # what was measured
    remedy: str = ""  # of what is not ok: how to mend it
    nodes: tuple[str, ...] = ()
    exit_code: int = 0


def ok(check: str, value: str, nodes: Sequence[str] = ()) -> Finding:
    return Finding(check, "ok", value, nodes=tuple(nodes))


def warning(check: str, value: str, remedy: str, nodes: Sequence[str] = ()) -> Finding:
    return Finding(check, "warning", value, remedy, tuple(nodes))


def error(check: str, value: str, remedy: str, nodes: Sequence[str] = (), exit_code: int = 1) -> Finding:
    """exit_code 2: `train` would refuse to start, however often."""
    return Finding(check, "error", value, remedy, tuple(nodes), exit_code)


@dataclass(frozen=True)
class Failed:
    """Instead of a measurement: why there is none."""

    why: str
    remedy: str = ""  # empty: the check's own
    refused: bool = False  # by what `train` would do as well
    exit_code: int = 1  # 0: no reason to keep the run from these nodes


@dataclass(frozen=True)
class Process:
    """Which one. leaders: the first rank of each node, in the order of their ranks."""

    rank: int
    node: str
    leaders: tuple[int, ...] = (0,)

    @property
    def leads(self) -> bool:
        return self.rank in self.leaders


Measured = Sequence[tuple[Process, Any]]  # by rank, of the processes that measured something


class Check(ABC):
    """`measure` runs in every process, in the same order; `judge` sees what came of it, and nothing else."""

    name: str
    mend: str  # what to do where it cannot be measured
    needed: bool = True  # by the run; else a warning where it cannot be measured
    seconds: float = 10  # that measuring may take; inf where it waits for other processes, which may have been slow

    @abstractmethod
    def measure(self, here: Process, agreement: Agreement) -> Any:
        """Plain values, or Failed; None where this process has nothing to measure. Whatever it raises is a finding."""

    @abstractmethod
    def judge(self, measured: Measured) -> Iterator[Finding]:
        """Called with at least one measurement."""


def examine(
    checks: Sequence[Check], here: Process, agreement: Agreement, left: Callable[[], float]
) -> Mapping[str, Any]:
    """What each check measured, by its name. left: seconds until all must have ended."""
    measured = {}
    for check in checks:
        seconds = min(check.seconds, left())
        measured[check.name] = limited(lambda check=check: check.measure(here, agreement), seconds)
    return measured


def limited(action: Callable[[], Any], seconds: float) -> Any:
    """What the action returns; Failed if it raises, or goes on for longer (a dead file server answers to nobody)."""
    if seconds <= 0:
        remedy = "see what took so long, or raise doctor.timeout_seconds"
        return Failed("not looked at: the time was up", remedy, exit_code=0)
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(action())
        except UserError as mistake:
            results.append(Failed("train would refuse this", str(mistake), True, mistake.exit_code))
        except Exception as problem:  # noqa: BLE001 (it is what the doctor has found)
            results.append(Failed(f"{type(problem).__name__}: {_first_line(str(problem))}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else Failed(f"no answer within {seconds:.0f} s", exit_code=0)  # it may be slow only


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:300]


def judge(checks: Sequence[Check], reports: Sequence[tuple[Process, Mapping[str, Any]]]) -> list[Finding]:
    """The findings of all checks; what several of them would say alike is said by the first."""
    findings: list[Finding] = []
    for check in checks:
        values = [(process, measured[check.name]) for process, measured in reports if measured[check.name] is not None]
        failed = [(process, value) for process, value in values if isinstance(value, Failed)]
        good = [(process, value) for process, value in values if not isinstance(value, Failed)]
        findings += _failures(check, failed, [f.remedy for f in findings], at_most=1 if good else 2)
        if good:
            findings += check.judge(good)
    return findings


def _failures(
    check: Check, failed: Sequence[tuple[Process, Failed]], said: Sequence[str], at_most: int
) -> Iterator[Finding]:
    """at_most: the exit code; what other nodes do not refuse, another start may not meet again."""
    for why in dict.fromkeys(value for _, value in failed):
        if not (why.refused and why.remedy in said):
            where = nodes_of([process for process, value in failed if value == why])
            says = check.name, why.why, why.remedy or check.mend, where
            bad = why.exit_code and (check.needed or why.refused)
            yield error(*says, min(why.exit_code, at_most)) if bad else warning(*says)


def nodes_of(processes: Sequence[Process]) -> list[str]:
    return list(dict.fromkeys(process.node for process in processes))


def grouped(measured: Measured, key: Callable[[Any], Any] = lambda value: value) -> dict[Any, list[Process]]:
    """The processes that measured alike, the largest group first."""
    groups: dict[Any, list[Process]] = {}
    for process, value in measured:
        groups.setdefault(key(value), []).append(process)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def below_peers(values: Mapping[Any, float], share: float) -> dict[Any, float]:
    """Of those that have less than `share` of the median of all the others: what share it is."""
    shares = {}
    for name, value in values.items():
        others = [v for other, v in values.items() if other != name]
        if others and value < share * median(others):
            shares[name] = value / median(others)
    return shares


def screen(findings: Sequence[Finding], title: str) -> str:
    """The report for people: a line each, and one for each remedy."""
    lines = [title]
    for f in findings:
        where = f" [{_names(f.nodes)}]" if f.nodes else ""
        lines.append(f"  {f.status:<8} {f.check:<{WIDTH}} {f.value}{where}")
        if f.remedy:
            indent = " " * (WIDTH + 12)
            lines.append(f"{indent}-> " + f.remedy.strip().replace("\n", f"\n{indent}   "))
    counts = {status: sum(f.status == status for f in findings) for status in ("error", "warning")}
    said = [f"{n} {status}{'s' if n > 1 else ''}" for status, n in counts.items() if n]
    return "\n".join([*lines, ", ".join(said) or "all is well"])


def _names(nodes: Sequence[str]) -> str:
    more = len(nodes) - SHOWN
    return ", ".join(nodes[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def size_of(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def time_of(seconds: float) -> str:
    """A duration, for people."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"
