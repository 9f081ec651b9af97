"""Sweeps of stand-ins: processes that do at once what a point is told to."""

import json
import os
import sys
from pathlib import Path

from diffusion_trainer.apps.launchers import Local
from diffusion_trainer.apps.multirun import Sweep, grouped
from diffusion_trainer.apps.places import Place, Point
from diffusion_trainer.apps.sweep_record import Record, held
from diffusion_trainer.apps.sweepers import Course, Listed

# Stands for `python -m diffusion_trainer`: does what the override do=... says and writes the report that out=... names.
STAND_IN = """
import json, os, signal, sys, time
verb, *overrides = sys.argv[1:]
said = dict(o.split("=", 1) for o in overrides)
with open("started", "a") as file:
    print(said["do"], os.getpid(), os.environ.get("WANDB_RUN_GROUP"), file=file, flush=True)
if said["do"] == "interrupt":  # as Ctrl-C does, but of the parent alone
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(20)
if said["do"] == "hang up":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    os.kill(os.getppid(), signal.SIGHUP)
    time.sleep(20)
if said["do"] == "poke":
    os.kill(os.getppid(), signal.SIGINT)
if said["do"] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if said["do"] == "once" and not os.path.exists("once"):  # killed with its sweep the first time; it stops slowly
    open("once", "w").close()
    def stop(number, frame):
        time.sleep(2)
        with open("started", "a") as file:
            print("stopped", os.getpid(), file=file, flush=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(20)
if said["do"].startswith("meet"):  # one that waits until the other is there
    open(said["do"], "w").close()
    other = {"meet1": "meet2", "meet2": "meet1"}[said["do"]]
    while not os.path.exists(other):
        time.sleep(0.01)
if said["do"].startswith("both"):
    open(said["do"], "w").close()
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(130))
    while not (os.path.exists("both1") and os.path.exists("both2")):
        time.sleep(0.01)
    if said["do"] == "both1":
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(20)
with open(said["do"] + ".share", "w") as file:
    json.dump({"cores": sorted(os.sched_getaffinity(0)), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}, file)
if said["do"].startswith("fail"):
    print("what", said["do"], "says", flush=True)
    sys.exit(int(said["do"][4:]))
with open(said["out"], "w") as file:
    json.dump({"metrics": {"fid": len(said["do"]) / 3}}, file)
print("did", said["do"], flush=True)
"""


def stand_in(folder: Path) -> tuple[str, ...]:
    """The command that stands for `python -m diffusion_trainer`."""
    (folder / "stand_in.py").write_text(STAND_IN)
    return sys.executable, str(folder / "stand_in.py")


def point(do: str, **config) -> Point:
    out = Path(f"{do}.json")
    return Point((f"do={do}",), (f"do={do}", f"out={out}"), Place({}, out, out, Path("home")), config)


def started() -> list[str]:
    """What was done, in the order in which it began."""
    return [line.split()[0] for line in Path("started").read_text().splitlines()]


def run(*points: Point) -> tuple[list[int], int]:
    """Exit codes of the points that ended, and the signal that stopped the sweep."""
    sweep = begin(Listed(points))
    return sweep.codes, sweep.received[0] if sweep.received else 0


def begin(course: Course, launcher=None, verb: str = "evaluate") -> Sweep:
    """The sweep, as it ended."""
    record = Record(course.home, verb, course.study, course.metric, course.direction)
    with held(course.home) as lock, grouped("home"):
        record.begin(course.known)
        sweep = Sweep(verb, course, launcher or Local(), record, lock)
        sweep.run()
    return sweep


def states(home: str = "home") -> dict[str, str]:
    """Of the last plan's points, by what they do."""
    return {entry["swept"][0]: entry["state"] for entry in json.loads(Path(home, "sweep.json").read_text())["points"]}


def killed(*points: Point) -> int:
    """What becomes of a sweep in a process of its own: its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        run(*points)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
