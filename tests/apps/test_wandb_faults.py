"""Weights & Biases refuses, hangs, fails or dies; training goes on under it, and each point is there once.

With real W&B clients and services; what a server would get is read from the records that they keep. Restarts, and a
server that answers, are in test_wandb_sync.py.
"""

import csv
import os
import signal
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import SMALL, command, finish

from diffusion_trainer.callbacks.loggers import Wandb
from diffusion_trainer.callbacks.wandb_files import history, points_of

pytestmark = pytest.mark.slow
RUN = [
    "train", "experiment=digits", *[o for o in SMALL if o != "logger=csv"], "strategy=single",
    "callbacks.evaluate=null", "logger.wandb.init_timeout_seconds=3", "callbacks.checkpoint.every_n_images=320",
]  # fmt: skip
SHORT, LONG = "num_images=64", "num_images=3200"


def written(run: Path) -> Counter:
    """(images seen, metric) of each cell of metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return Counter((int(row["images_seen"]), key) for row in rows for key in row if key != "images_seen")


def sent(run: Path) -> Counter:
    """The same, of all records of W&B: how often each point is in them."""
    files = (run / "wandb").glob("*run-*/run-*.wandb")
    return Counter(point for path in files for row in history(path) for point in points_of(row))


def services(pid: int) -> list[int]:
    """The wandb-core processes below a process."""
    found = []
    for child in [c for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()]:
        name = Path(f"/proc/{child}/comm").read_text().strip()
        found += [int(child)] if name == "wandb-core" else services(int(child))
    return found


def alive(pid: int) -> bool:
    """A process that has ended may wait for somebody who asks how."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(run: Path, images: int) -> None:
    end = time.monotonic() + 200
    while not (run / "metrics.csv").is_file() or max(at for at, _ in written(run)) < images:
        assert time.monotonic() < end, "never logged"
        time.sleep(0.02)


@pytest.fixture(params=["refuses", "never answers", 401, 500])
def server(request):
    """Its URL."""
    if request.param in (401, 500):

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(request.param)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_):
                return None

        web = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        return
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            listening.listen(100)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_is_not_there_costs_a_bounded_time_and_the_run_is_offline(workplace, server):
    key = "0123456789" * 4
    process = command(*RUN, SHORT, "logger.wandb.mode=online", cwd=workplace, WANDB_BASE_URL=server, WANDB_API_KEY=key)
    code, output = finish(process)
    run = workplace / "runs" / "digits"
    assert code == 0, output
    assert output.count("  WARNING: Weights & Biases") == 1, output
    assert "goes on offline" in output
    assert f"`diffusion-trainer wandb-sync run={run.relative_to(workplace)}`" in output
    assert key not in output
    assert {at for at, _ in written(run)} == {16, 32, 48, 64}
    assert sent(run) == written(run)


def test_a_service_that_is_killed_is_told_once_and_no_point_is_lost(workplace):
    run = workplace / "runs" / "digits"
    process = command(*RUN, LONG, cwd=workplace)
    wait_for(run, 160)
    (service,) = services(process.pid)
    os.kill(service, signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert output.count("  WARNING: Weights & Biases") == 1, output
    assert {at for at, _ in written(run)} == set(range(16, 3201, 16))
    assert sent(run) == written(run)


def test_a_service_that_hangs_is_left_at_the_end_and_the_next_start_sends_what_is_missing(workplace):
    run = workplace / "runs" / "digits"
    arguments = [*RUN, "logger.wandb.finish_timeout_seconds=2"]
    process = command(*arguments, "num_images=1600", cwd=workplace)
    wait_for(run, 160)
    (service,) = services(process.pid)
    os.kill(service, signal.SIGSTOP)
    code, output = finish(process)
    assert code == 0, output
    assert output.count("  WARNING: Weights & Biases") == 1, output
    assert "has not ended within 2 s" in output
    assert not alive(service)
    assert sum(sent(run).values()) < sum(written(run).values())
    code, output = finish(command(*arguments, "num_images=1632", cwd=workplace))
    assert code == 0, output
    assert sent(run) == written(run)


@pytest.mark.parametrize("key", ["init_timeout_seconds", "finish_timeout_seconds"])
def test_no_limit_is_refused(key):
    with pytest.raises(Exception, match="must be positive"):
        Wandb("project", **{key: 0})
