"""Two nodes with networks of their own, and a cable between them that is drawn out in the middle of a run."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, finish
from ledgers import until
from spied_runs import SPY, bitwise

from diffusion_trainer.callbacks.watchdog import HUNG
from diffusion_trainer.training.checkpoints import Checkpoint, latest

TIMEOUT = 8  # seconds without progress
IMAGES = 1280
RUN = [
    "train", *SPY, "strategy=zero2", f"num_images={IMAGES}", "callbacks.checkpoint.every_n_images=160",
    "+callbacks.ledger._target_=spies.Ledger", f"callbacks.heartbeat.hang_timeout_seconds={TIMEOUT}",
]  # fmt: skip
ALLOWED = os.getuid() == 0 and shutil.which("ip") and subprocess.run(["unshare", "--net", "true"]).returncode == 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ALLOWED, reason="only root makes networks, with `ip` of iproute2"),
]


class Nodes:
    """Two network namespaces that a pair of interfaces connects: its ends are named as they are."""

    def __init__(self):
        self.names = [f"dt{os.getpid()}{side}" for side in "ab"]

    def __enter__(self) -> "Nodes":
        a, b = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
        for rank, name in enumerate(self.names):
            _ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", name, "up")
        return self

    def __exit__(self, *exception) -> None:
        for name in self.names:
            _ip("netns", "del", name)

    def cable(self, state: str) -> None:
        """`down` and `up`: nobody is told, packets just do not arrive."""
        _ip("-n", self.names[0], "link", "set", self.names[0], state)

    def start(self, rank: int, folder: Path, log: Path) -> subprocess.Popen:
        """The rank of a run on its node, as torchrun would start it."""
        meeting = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank}
        meeting |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29500}
        run = ["ip", "netns", "exec", self.names[rank], sys.executable, "-m", "diffusion_trainer"]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        env |= {key: str(value) for key, value in meeting.items()} | {"GLOO_SOCKET_IFNAME": self.names[rank]}
        with log.open("ab") as file:
            return subprocess.Popen([*run, *RUN, "name=cut"], cwd=folder, env=env, stdout=file, stderr=file)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def nodes():
    with Nodes() as nodes:
        yield nodes


def test_a_cut_network_is_noticed_on_both_sides_and_the_run_goes_on_as_if_nothing_had_happened(nodes, workplace):
    run, log = workplace / "runs" / "cut", workplace / "log"
    ranks = [nodes.start(rank, workplace, log) for rank in (0, 1)]
    until(run, 480, ranks[0])
    nodes.cable("down")
    begin = time.monotonic()
    assert [rank.wait(120) for rank in ranks] == [HUNG, HUNG], log.read_text()
    assert time.monotonic() - begin < TIMEOUT + 20
    for rank in (0, 1):
        stacks = (run / "logs" / f"stacks-rank-{rank}.txt").read_text()
        assert "hung: no progress for" in stacks
        assert "distributed_c10d.py" in stacks  # of the collective that it waits in
    stopped = Checkpoint(latest(run / "checkpoints")).images_seen
    assert 320 <= stopped < IMAGES
    nodes.cable("up")
    ranks = [nodes.start(rank, workplace, log) for rank in (0, 1)]
    assert [rank.wait(200) for rank in ranks] == [0, 0], log.read_text()
    code, output = finish(command(*RUN, "name=alone", cwd=workplace))
    assert code == 0, output
    reports = (run / f"spy-{stopped}.pt", workplace / "runs" / "alone" / "spy-0.pt")
    assert bitwise(*(torch.load(report, weights_only=True) for report in reports))
