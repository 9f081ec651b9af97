"""Jobs of SLURM, through its own commands: nothing else is needed where people submit from."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from diffusion_trainer.conventions import UserError

GONE = "GONE"  # the controller has forgotten the job (MinJobAge after its end, 300 s by default) or never had it
UNKNOWN = "UNKNOWN"  # the controller does not answer: ask again later
OVER = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE", "REVOKED",
    "PREEMPTED",  # and not put back: one that is stays in the queue
    GONE,
)  # fmt: skip
OUTSIDE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # variables that say which cluster, and who asks
SECONDS = 60  # a command of SLURM repeats its question by itself for a while
_MISSING = (
    "there is no {} on this machine: SLURM's commands are not installed here, or not on PATH. Submit from a login node "
    "of the cluster, or train here: diffusion-trainer train ..."
)
_SILENT = "configuration source|[Uu]nable to contact|no answer within"  # no slurm.conf, or a controller that is down
_NO_CLUSTER = (
    "SLURM's commands are here, and no cluster answers them. Is this a login node, is SLURM_CONF right, is its "
    "controller up (scontrol ping)? To train here: diffusion-trainer train ..."
)


@dataclass(frozen=True)
class Live:
    """A job of this user that waits or runs."""

    number: str
    state: str
    script: str  # its path, as it was submitted


class Slurm:
    """The cluster that this machine can submit to. Commands run in this process's environment, without what belongs to
    a job around it: a job submitted from inside a job is not a part of it.

    All methods raise UserError where SLURM is not installed, or when it refuses, with its own words.
    """

    def is_here(self) -> bool:
        return shutil.which("sbatch") is not None

    def require(self) -> None:
        """UserError where SLURM is not installed."""
        if not self.is_here():
            raise UserError(_MISSING.format("sbatch"))

    def submit(self, script: Path) -> str:
        """The new job's number."""
        text = self._run("sbatch", "--parsable", *_directives(script.read_text()), str(script))
        return text.strip().split(";")[0]  # <job>;<cluster>

    def cancel(self, job: str) -> None:
        """It is told to stop, saves, and does not come back."""
        self._run("scancel", job)

    def rehearse(self, script: str) -> str:
        """What `sbatch --test-only` says to the text of a script: when it would start, and where."""
        done = self._start("sbatch", "--test-only", *_directives(script), stdin=script)
        if done.returncode:
            raise UserError("\n".join([_complaint("sbatch", done), *self._partitions_if_known()]))
        return re.sub(r"^sbatch: ", "", (done.stderr or done.stdout).strip(), flags=re.MULTILINE)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ...; GONE and UNKNOWN as above. In OVER, it stays so."""
        return self.show(job).get("JobState", UNKNOWN)

    def show(self, job: str) -> dict[str, str]:
        """JobState, ExitCode, StdOut and all else that `scontrol show job` has; JobState alone if that is no answer."""
        done = self._start("scontrol", "show", "job", "--oneliner", job)
        if done.returncode:
            return {"JobState": GONE if "Invalid job id" in done.stderr else UNKNOWN}
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))

    def live(self) -> list[Live]:
        """This user's jobs that have not ended."""
        lines = self._run("squeue", "--me", "--noheader", "--format=%i|%T|%o").splitlines()
        return [Live(*line.strip().split("|", 2)) for line in lines]

    def of(self, script: Path) -> Live | None:
        """The job that was submitted with this script, given by its absolute path, and has not ended."""
        return next((job for job in self.live() if job.script == str(script)), None)

    def partitions(self) -> str:
        """The partitions in words, with their time limits and nodes."""
        lines = self._run("sinfo", "--noheader", "--format=%R|%l|%D").splitlines()
        rows = [line.strip().split("|") for line in lines]
        named = [f"{name} (up to {limit}, {nodes} node{'s' * (nodes != '1')})" for name, limit, nodes in rows]
        return f"partitions here: {', '.join(named) or 'none'}"

    def _partitions_if_known(self) -> list[str]:
        try:
            return [self.partitions()]
        except UserError:  # an addition to another complaint, which must not be lost for it
            return []

    def _run(self, *command: str) -> str:
        done = self._start(*command)
        if done.returncode:
            raise UserError(_complaint(command[0], done))
        return done.stdout

    def _start(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k in OUTSIDE}
        try:
            return subprocess.run(command, input=stdin, env=outside, capture_output=True, text=True, timeout=SECONDS)
        except FileNotFoundError as error:
            raise UserError(_MISSING.format(command[0])) from error
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 1, "", f"no answer within {SECONDS} s")


def _directives(script: str) -> list[str]:
    """The options of its #SBATCH lines, for the command line: in the script itself SBATCH_TIMELIMIT and its like, which
    sites and users set in their profiles, would overrule what has been checked and shown.
    """
    header = takewhile(lambda line: line.startswith("#") or not line.strip(), script.splitlines())
    lines = [line.removeprefix("#SBATCH ") for line in header if line.startswith("#SBATCH ")]
    return [option for line in lines for option in shlex.split(line)]


def _complaint(command: str, done: subprocess.CompletedProcess[str]) -> str:
    """What a command said, without what stands before it on each line; and what to do where no cluster answers it."""
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    said = "; ".join(re.sub(r"^(\w+: error: |\w+: |allocation failure: )", "", line) for line in lines)
    return f"{command}: {said}" + (f"\n{_NO_CLUSTER}" if re.search(_SILENT, said) else "")
