"""A real SLURM of a few nodes on this machine, to try jobs on: munged, slurmctld and one slurmd a node.

    python launch/local_cluster.py up [--nodes 2] [--folder F]
    python launch/local_cluster.py down [--folder F]

Everything is in one folder, nothing in /etc; ports and the first job's number are random, so that several clusters live
side by side. Nodes share the machine: its memory, its cores, its address. Jobs of the partition `high` preempt those of
`main`, the default. Needs no root; Debian and Ubuntu: apt-get install slurm-wlm munge.
"""

import argparse
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

MUNGE, CONTROLLER, NODE = "munged", "slurmctld", "slurmd"
SBIN = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin:/sbin"  # not on every user's path
SOCKET_LIMIT = 100  # Linux: 107 bytes for the path of a socket
CLIENTS = (MUNGE, CONTROLLER, NODE, "slurmstepd", "srun", "sbatch", "salloc")
HOME = "LOCAL_CLUSTER_NODE"  # the variable that tells a node's daemon, and its children that watch jobs, from others'
UP_SECONDS, DOWN_SECONDS = 60, 10

CONFIGURATION = Path(__file__).with_name("local_cluster.conf")


class ClusterError(Exception):
    """It cannot be started; the message says what to do."""


class LocalCluster:
    """A cluster in `folder`; as a context manager it is up inside and leaves no process behind.

    nodes: how many, named node1, node2, ...; cpus: of each, this machine's number by default.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int | None = None):
        if nodes < 1:
            raise ClusterError(f"a cluster has at least one node, not {nodes}")
        self.folder, self.cpus = folder.absolute(), cpus or os.cpu_count() or 1
        if len(str(self.folder / "munge" / "socket")) > SOCKET_LIMIT or re.search(r"[\s#,=]", str(self.folder)):
            raise ClusterError(
                f"the path {self.folder} is too long for a socket in it, or has a character that slurm.conf cannot "
                "have in a path: give another --folder"
            )
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.conf = self.folder / "slurm.conf"
        self._daemons: list[tuple[str, subprocess.Popen]] = []
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env = {**outside, "PATH": SBIN, "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> "LocalCluster":
        self.up()
        return self

    def __exit__(self, *exception) -> None:
        self.down()

    def up(self) -> None:
        """Returns when all nodes are idle. ClusterError: one is up in the folder, or something is missing or fails."""
        missing = [name for name in (MUNGE, CONTROLLER, NODE, "sbatch") if shutil.which(name, path=SBIN) is None]
        if missing:
            raise ClusterError(f"{', '.join(missing)} not found; Debian, Ubuntu: apt-get install slurm-wlm munge")
        if self.processes():
            raise ClusterError(f"a cluster is up in {self.folder} already: take it down, or give another --folder")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self.conf.is_file():
            raise ClusterError(f"{self.folder} has files that are of no cluster: give a --folder that is new or empty")
        self._write()
        try:
            self._start()
        except BaseException:
            self.down()
            raise

    def _start(self) -> None:
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(MUNGE, MUNGE, "--foreground", "--force", f"--socket={munge}/socket", *files)
        self._wait((munge / "socket").exists)
        self._daemon(CONTROLLER, CONTROLLER, "-D", "-f", str(self.conf))
        for name in self.nodes:
            self.boot(name)
        self._wait(lambda: self.states() == ["idle"] * len(self.nodes))

    def boot(self, node: str) -> None:
        """Starts the daemon of a node."""
        self._daemon(node, NODE, "-D", "-N", node, "-f", str(self.conf))

    def lose(self, node: str) -> None:
        """The node's daemon is killed: what jobs run there goes on, unseen. `boot` brings it back."""
        for name, process in self._daemons:
            if name == node:
                process.kill()
                process.wait()
        self._daemons = [(name, process) for name, process in self._daemons if name != node]

    def crash(self, node: str) -> None:
        """The node loses its power: its daemon, and all that jobs run there, are killed. `boot` brings it back."""
        self.lose(node)
        for pid in self.processes(node):
            _kill(pid)

    def down(self) -> None:
        """Daemons, and all that jobs have started, are killed: those that ignore SIGTERM would hold it up."""
        end = time.monotonic() + DOWN_SECONDS
        while pids := self.processes():
            if time.monotonic() > end:
                raise ClusterError(f"these processes cannot be killed: {pids}")
            for pid in pids:
                _kill(pid)
            time.sleep(0.05)
        for _, process in self._daemons:
            process.wait()
        self._daemons = []

    def processes(self, node: str | None = None) -> list[int]:
        """Of this cluster: daemons, clients, and what jobs have started; not a shell that has exported SLURM_CONF.

        node: only what runs on it.
        """
        return sorted(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and self._is_ours(p, node))

    def _is_ours(self, process: Path, node: str | None) -> bool:
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            name = (process / "comm").read_text().strip()
        except OSError:  # it has ended, or is another user's
            return False
        if f"SLURM_CONF={self.conf}".encode() not in environment or int(process.name) == os.getpid():
            return False
        if node and not {f"{key}={node}".encode() for key in ("SLURMD_NODENAME", HOME)} & set(environment):
            return False
        return name in CLIENTS or any(entry.startswith(b"SLURM_JOB_ID=") for entry in environment)

    def run(self, *arguments: str, cwd: Path | None = None, **env: str) -> str:
        """What a command of SLURM prints; ClusterError with its complaint if it fails."""
        done = subprocess.run(arguments, cwd=cwd, env={**self.env, **env}, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"{arguments[0]} failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def states(self) -> list[str]:
        found = subprocess.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%t"], env=self.env, capture_output=True)
        return found.stdout.decode().split()  # nothing until the controller answers

    def job(self, number: str) -> dict[str, str]:
        """JobState, Restarts, ExitCode and all else that `scontrol show job` knows."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def _write(self) -> None:
        for name in ("munge", "state", "spool"):
            shutil.rmtree(self.folder / name, ignore_errors=True)  # of a cluster that was here before
            (self.folder / name).mkdir(parents=True, mode=0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(self.nodes))
        size = f"CPUs={self.cpus} RealMemory={os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') >> 20}"
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {size}"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        self.conf.write_text(
            CONFIGURATION.read_text().format(
                host=host, controller_port=ports[0], user=pwd.getpwuid(os.getuid()).pw_name, folder=self.folder,
                first_job=random.randrange(1000, 20000), nodes="\n".join(nodes),
            )
        )  # fmt: skip

    def _daemon(self, name: str, binary: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [binary, *arguments],
                env=self.env | {HOME: name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is not for them
            )
        self._daemons.append((name, process))

    def _wait(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + UP_SECONDS
        while not ready():
            for name, process in self._daemons:
                log = self.folder / f"{name}.log"
                if process.poll() is not None:
                    raise ClusterError(f"{name} ended; the end of {log}:\n{log.read_text(errors='replace')[-1000:]}")
            if time.monotonic() > end:
                raise ClusterError(f"not up after {UP_SECONDS} s, nodes are {self.states()}; logs are in {self.folder}")
            time.sleep(0.05)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself, or with another


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("up", "down"))
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, help="of each node; this machine's number by default")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / f"local-slurm-{os.getuid()}")
    options = parser.parse_args(arguments)
    try:
        cluster = LocalCluster(options.folder, options.nodes, options.cpus)
        if options.verb == "down":
            if not cluster.conf.is_file() and not cluster.processes():
                raise ClusterError(
                    f"there is no cluster in {cluster.folder}: give the --folder that it was started with"
                )
            cluster.down()
            return 0
        cluster.up()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(cluster.nodes)} nodes are up; logs are in {cluster.folder}. To use them:\n")
    print(f"  export SLURM_CONF={cluster.conf}")
    print("  diffusion-trainer submit launcher=local_cluster experiment=digits strategy=zero2")
    print("  sinfo; squeue; scancel <job>")
    print(f"  python launch/local_cluster.py down --folder {cluster.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
