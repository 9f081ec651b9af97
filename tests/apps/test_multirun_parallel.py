"""Points of a sweep at the same time on one machine: each has its share of it, and its own log."""

import csv
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import sweeping
import torch
from conftest import SMALL
from sweeping import begin, point, started

from diffusion_trainer.apps import launchers
from diffusion_trainer.apps.launchers import Local, Share, shares
from diffusion_trainer.apps.sweepers import Listed
from diffusion_trainer.conventions import UserError, cores

pytestmark = pytest.mark.skipif(sys.platform != "linux" or cores() < 2, reason="two cores are needed")


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launchers, "COMMAND", sweeping.stand_in(tmp_path))


def share(do: str) -> dict:
    return json.loads(Path(f"{do}.share").read_text())


@pytest.mark.usefixtures("command")
def test_points_run_at_the_same_time_on_cores_of_their_own(capfd):
    """Two wait for each other, so one after the other they would never end; the third takes the place that is free."""
    sweep = begin(Listed([point("meet1"), point("meet2"), point("a")]), Local(parallel=2))
    assert sweep.codes == [0, 0, 0]
    on = [set(share(do)["cores"]) for do in ("meet1", "meet2", "a")]
    assert on[0] | on[1] == os.sched_getaffinity(0)
    assert not on[0] & on[1]
    assert on[2] in on[:2]
    printed = capfd.readouterr().out
    assert "did meet1" not in printed
    assert Path("meet1.json.log").read_text() == "did meet1\n"
    assert "do=meet1 has ended" in printed


@pytest.mark.usefixtures("command")
def test_a_point_that_fails_is_told_with_the_end_of_its_log(capfd):
    sweep = begin(Listed([point("fail3"), point("a")]), Local(parallel=2))
    assert sorted(sweep.codes) == [0, 3]
    printed = capfd.readouterr().out
    assert "do=fail3 has ended with exit code 3; fail3.json.log ends:\n  what fail3 says\n" in printed


@pytest.mark.usefixtures("command")
def test_no_more_than_asked_for_run_at_once(monkeypatch):
    most, start = [], Local.start

    def counted(self, *arguments):
        most.append(sum(p is not None and p.poll() is None for _, p in self.places))
        return start(self, *arguments)

    monkeypatch.setattr(Local, "start", counted)
    assert begin(Listed([point(do) for do in "abcde"]), Local(parallel=2)).codes == [0] * 5
    assert max(most) <= 1


@pytest.mark.usefixtures("command")
def test_ctrl_c_reaches_all_that_run_and_starts_no_other():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sweep = begin(Listed([point("both1"), point("both2"), point("a")]), Local(parallel=2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (sweep.codes, sorted(started())) == ([130, 130], ["both1", "both2"])


@pytest.mark.parametrize(("named", "parts"), [(None, ["0,1", "2,3"]), ("4,5,6,7", ["4,5", "6,7"])])
def test_gpus_are_shared_out(monkeypatch, named, parts):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [share.gpus for share in shares(2)] == parts
    assert shares(1) == [Share()]
    for count in (3, 8):
        with pytest.raises(UserError, match=f"parallel={count}: 4 GPUs are no {count} equal shares"):
            shares(count)


@pytest.mark.usefixtures("command")
def test_a_point_sees_the_gpus_of_its_share_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert begin(Listed([point("meet1"), point("meet2")]), Local(parallel=2)).codes == [0, 0]
    assert [share(do)["gpus"] for do in ("meet1", "meet2")] == ["GPU-a", "GPU-b"]


@pytest.mark.usefixtures("command")
def test_a_log_that_cannot_be_written_is_one_points_mistake(capfd):
    Path("a.json.log").mkdir()
    assert sorted(begin(Listed([point("a"), point("b")]), Local(parallel=2)).codes) == [0, 2]
    assert "error: a.json.log, for what the point prints, cannot be written" in capfd.readouterr().err


@pytest.mark.slow
def test_runs_of_two_processes_two_at_a_time_have_the_metrics_that_they_have_alone(cli, workplace):
    arguments = [
        "train",
        "-m",
        "experiment=digits",
        *SMALL,
        "strategy=zero2",
        "num_images=64",
        "optimizer.lr=0.001,0.002",
    ]
    for name, parallel in (("alone", []), ("together", ["parallel=2"])):
        code, output = cli(*arguments, *parallel, f"name={name}")
        assert code == 0, output
    found = {}
    for name in ("alone", "together"):
        with (workplace / "runs" / name / "table.csv").open(newline="") as file:
            found[name] = list(csv.DictReader(file))
    assert found["alone"] == found["together"]
    log = workplace / "runs" / "together" / "optimizer.lr-0.001.log"
    assert "ZeRO-2 on 2 cpu processes" in log.read_text()
    assert json.loads((workplace / "runs" / "together" / "sweep.json").read_text())["points"][1]["state"] == "done"
