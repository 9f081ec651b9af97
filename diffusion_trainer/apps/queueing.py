"""Points of a sweep as jobs of SLURM: all are queued at once, and go on without the sweep that watches them."""

import time
from collections.abc import Sequence

from diffusion_trainer.apps import submit
from diffusion_trainer.apps.folder import JOB
from diffusion_trainer.apps.jobs import OVER, UNKNOWN, Slurm
from diffusion_trainer.apps.launchers import Launcher, Started
from diffusion_trainer.apps.places import Point
from diffusion_trainer.apps.planning import Check, Planner, Show
from diffusion_trainer.conventions import UserError


class OnSlurm(Launcher):
    """Each point is the job that `diffusion-trainer submit` makes of it; submit's keys (nodes=..., launcher=...) stand
    among the sweep's and may be swept.

    parallel: jobs that are queued at the same time, at most; None: all of a grid, four of a search.
    """

    lives_on = True

    def __init__(self, parallel: int | None = None, poll_seconds: float = 5.0):
        if parallel is not None and parallel < 1:
            raise ValueError(f"parallel must be positive, not {parallel}")
        if poll_seconds <= 0:
            raise ValueError(f"poll_seconds must be positive, not {poll_seconds}")
        self.at_once, self.seconds = parallel, poll_seconds
        self.slurm = Slurm()
        self._seen, self._until = {}, 0.0

    def planner(self, verb: str, show: Show, check: Check) -> Planner:
        if verb != "train":
            raise UserError(f"hydra/launcher=slurm is for train; {verb} sweeps here: leave it out")
        self.slurm.require()
        return Planner(verb, submit.show, self._check, submit.OWN)

    def _check(self, overrides: Sequence[str]) -> None:
        job = submit.prepare(overrides)
        if job.dry_run:
            raise UserError("dry_run=true is for submit: try one point with it; leave it out here")
        self.slurm.rehearse(job.text)

    def start(self, verb: str, point: Point, job: str | None, held: int) -> Started:
        self._until = 0.0  # a new job is not in what was seen before
        there = self.slurm.of(point.place.out.resolve() / JOB)
        if there:
            print(f"  job {there.number} is in the queue already", flush=True)
            return QueuedPoint(self, point, there.number)
        number = self.slurm.submit(submit.job(point.overrides))
        print(f"  job {number}, log {point.place.out}/logs/slurm-{number}.log", flush=True)
        return QueuedPoint(self, point, number)

    def live(self) -> dict[str, str]:
        """Number -> state of all jobs that have not ended; one question to the controller for all points.

        UserError if it does not answer.
        """
        if time.monotonic() >= self._until:
            self._seen = {job.number: job.state for job in self.slurm.live()}
            self._until = time.monotonic() + self.seconds / 2
        return self._seen


class QueuedPoint(Started):
    def __init__(self, launcher: OnSlurm, point: Point, job: str):
        self.launcher, self.point, self.job = launcher, point, job

    def code(self) -> int | None:
        try:
            if self.job in self.launcher.live():
                return None
        except UserError:
            return None  # the controller does not answer now; the job needs it as little as we do
        job = self.launcher.slurm.show(self.job)
        state = job.get("JobState", UNKNOWN)
        if state not in OVER:
            return None
        if state != "COMPLETED" and self.point.place.complete(self.point.config):
            return 0  # cancelled when it had done all, or SLURM has forgotten it since it ended
        return code_of(state, job.get("ExitCode", ""))

    def stop(self, number: int) -> None:
        """Nothing: a job goes on."""

    def prune(self) -> bool:
        try:
            self.launcher.slurm.cancel(self.job)
        except UserError:
            return False  # the controller does not answer now
        return True


def code_of(state: str, text: str) -> int:
    """As a shell would say it. text: SLURM's ExitCode, <code>:<signal>."""
    if state == "COMPLETED":
        return 0
    code, _, number = text.partition(":")
    killed = 128 + int(number) if number.isdecimal() and int(number) else 0
    return killed or (int(code) if code.isdecimal() and int(code) else 1)
