"""What the doctor says of numbers that were made up: who is slow, who is different, who is late, and nobody else."""

import pytest

from diffusion_trainer.apps.doctor_disk import Folder, Saving
from diffusion_trainer.apps.doctor_machine import Clock, Cores, Memory, OpenFiles, Versions
from diffusion_trainer.apps.doctor_run import Shards, WeightsAndBiases
from diffusion_trainer.apps.doctor_speed import NO_GPU, AllReduce, Devices, Matmul, Wires
from diffusion_trainer.apps.findings import Process, below_peers, screen, size_of, time_of, warning


def processes(nodes: int, each: int = 1) -> list[Process]:
    leaders = tuple(range(0, nodes * each, each))
    return [Process(rank, f"node{rank // each + 1}", leaders) for rank in range(nodes * each)]


def judged(check, values, each: int = 1):
    """The findings about these values, one for each process."""
    return list(check.judge(list(zip(processes(len(values) // each, each), values, strict=True))))


def wrong(findings):
    return [(f.status, f.nodes) for f in findings if f.status != "ok"]


def test_below_peers_compares_with_the_others_alone():
    assert below_peers({"a": 1.0}, 0.8) == {}
    assert below_peers({"a": 0.5, "b": 1.0}, 0.8) == {"a": 0.5}
    assert below_peers({"a": 0.79, "b": 1.0, "c": 1.2, "d": 0.9}, 0.8) == {"a": pytest.approx(0.79)}
    assert below_peers({"a": 0.81, "b": 1.0, "c": 1.2, "d": 0.9}, 0.8) == {}
    # The mean would hide it behind one that is very slow.
    assert set(below_peers({"a": 0.1, "b": 0.7, "c": 1.0, "d": 1.0, "e": 1.0}, 0.8)) == {"a", "b"}


def test_a_slow_device_is_named_with_its_node():
    speeds = [[("cuda:0", 5e14)] for _ in range(4)]
    assert wrong(judged(Matmul(None, 0.8), speeds, each=2)) == []
    speeds[3] = [("cuda:0", 3e14)]
    (finding,) = judged(Matmul(None, 0.8), speeds, each=2)
    assert (finding.status, finding.nodes, finding.exit_code) == ("warning", ("node2",), 0)
    assert "rank 3 (cuda:0) is slow: 300 TFLOP/s, 60% of the others' median" in finding.value
    assert "--exclude" in finding.remedy
    # One process for a node looks at all of its devices.
    (finding,) = judged(Matmul(None, 0.8), [[("cuda:0", 5e14), ("cuda:1", 3e14)], [("cuda:0", 5e14), ("cuda:1", 5e14)]])
    assert "rank 0 (cuda:1)" in finding.value


def test_a_node_with_slow_wires_is_named_and_its_neighbours_are_not():
    """into[i] is the wire from node i to node i + 1: a slow node slows the one into it and the one out of it."""
    check, good, bad = Wires(0.5), 1e9, 1e8
    assert wrong(judged(check, [good] * 5)) == []
    for slow in range(5):
        into = [bad if i in (slow, (slow + 1) % 5) else good for i in range(5)]
        assert wrong(judged(check, into)) == [("warning", (f"node{slow + 1}",))]
    assert wrong(judged(check, [good, bad, good, good, good])) == []  # one wire: neither of its ends is to blame


def test_reductions_are_numbers_with_their_backend():
    value = {"speeds": {"gloo": (1e9, 2e-4), "nccl": (2e11, 1e-5)}, "gradient_bytes": 4e9}
    gloo, nccl = judged(AllReduce(None), [value] * 4)
    assert "gloo over 4 processes: 1 GB/s, 0.2 ms" in gloo.value
    assert "this model's gradients 20 ms" in nccl.value


def test_devices_of_another_kind_are_named_and_a_lost_gpu_is_an_error():
    assert wrong(judged(Devices(None), [["H100"], ["H100"], ["H100"]])) == []
    assert wrong(judged(Devices(None), [["H100"], ["A100"], ["H100"]])) == [("warning", ("node2",))]
    assert wrong(judged(Devices(None), [["H100"], [NO_GPU], ["H100"]])) == [("error", ("node2",))]
    assert wrong(judged(Devices(None), [[NO_GPU], [NO_GPU], ["H100"]])) == [("error", ("node1", "node2"))]


def test_another_version_is_named_with_its_node():
    values = [{"python": "3.11", "torch": "2.13", "deepspeed": "0.19", "commit": "c", "code": "a"} for _ in range(3)]
    assert wrong(judged(Versions(), values)) == []
    values[1] = {**values[1], "torch": "2.10", "code": "b"}
    findings = judged(Versions(), values)
    assert wrong(findings) == [("error", ("node2",))] * 2
    assert findings[0].value == "torch 2.10 here, 2.13 on the others"
    assert "make setup" in findings[0].remedy


def test_a_clock_that_is_off_is_named_with_its_way():
    assert wrong(judged(Clock(1.0), [100.0, 100.01, 100.9])) == []
    (finding,) = judged(Clock(1.0), [100.0, 97.0, 100.01])
    assert (finding.status, finding.nodes) == ("warning", ("node2",))
    assert "3 s behind" in finding.value
    assert "chrony" in finding.remedy
    (finding,) = judged(Clock(1.0), [100.0, 107.0, 100.0])
    assert "7 s ahead of node3" in finding.value
    (finding,) = judged(Clock(1.0), [101.5, 100.0])  # of two nodes it is the whole difference that counts
    assert "1.5 s ahead of node2" in finding.value


def cores(ids, workers=0, local=1, size=2):
    return {"cores": ids, "workers": workers, "local": local, "size": size}


def test_workers_need_cores_and_nodes_as_many_processes():
    assert wrong(judged(Cores(None), [cores([0, 1]), cores([0, 1])])) == []
    assert wrong(judged(Cores(None), [cores([0, 1], 4), cores([0, 1, 2, 3, 4], 4)])) == [("warning", ("node1",))]
    # One process of the doctor for each node of many: what it was given is not what the run will have.
    assert wrong(judged(Cores(None), [cores([0], 4, 8, 16), cores([0], 4, 8, 16)])) == []
    places = [Process(0, "a", (0, 2)), Process(1, "a", (0, 2)), Process(2, "b", (0, 2))]
    (finding,) = Cores(None).judge([(p, cores([0, 1, 2], size=3)) for p in places])
    assert (finding.status, finding.value) == ("error", "processes of each node: 2 on a, 1 on b")


def test_limits_of_a_node():
    assert wrong(judged(OpenFiles(), [1024, 4096])) == []
    assert wrong(judged(OpenFiles(), [1024, 256])) == [("warning", ("node2",))]
    assert wrong(judged(OpenFiles(), [1024, -1])) == []  # no limit
    assert wrong(judged(Memory(None), [{"free": 10, "needed": 9}, {"free": 8, "needed": 9}])) == [
        ("warning", ("node2",))
    ]


def folder(free, needed=10, problem=None, later=0, saved=False, spared=False):
    room = {"free": free, "needed": needed, "later": later, "path": "/runs", "saved": saved}
    return {"problem": problem, "spared": spared, **room}


def test_the_folder_needs_room_and_to_be_the_same_everywhere():
    assert wrong(judged(Folder(None), [folder(10), folder(11)])) == []
    assert wrong(judged(Folder(None), [folder(9), folder(11)])) == [("error", ())]
    goes_on = [folder(9, saved=True), folder(11, saved=True)]  # it trains with what it has, and says so
    assert wrong(judged(Folder(None), goes_on)) == [("warning", ())]
    full = folder(0, 0, problem="No space left on device", saved=True, spared=True)  # not a name has room
    assert wrong(judged(Folder(None), [full, folder(0, 0)])) == [("warning", ("node1",))]
    assert wrong(judged(Folder(None), [folder(11, later=2)])) == [("warning", ())]  # there is time to make room
    assert wrong(judged(Folder(None), [folder(12, later=2)])) == []
    assert wrong(judged(Folder(None), [folder(10), folder(11, problem="another")])) == [("error", ("node2",))]


def saving(speed, latency=0.0, took=None):
    return {"speed": speed, "latency": latency, "bytes": 60e9, "took": took}


def test_saving_is_compared_with_the_signal_lead():
    """A checkpoint of 60 GB at 1 GB/s takes 60 s; a stop may have to wait for the one before as well."""
    values = [saving(5e8), saving(5e8)]  # two processes of one node write at the same time
    for lead, status in ((121, "ok"), (119, "warning"), (59, "warning")):
        (finding,) = judged(Saving(None, lead), values, each=2)
        assert (finding.status, finding.exit_code) == (status, 0)
        assert "takes about 60 s" in finding.value
    assert "submit signal_lead_seconds=240 (by hand LEAD=240 sbatch --signal=TERM@240 ...)" in finding.remedy
    (finding,) = judged(Saving(None, 1000), [saving(1e9), saving(1e8)])
    assert "takes about 300 s" in finding.value  # each node half; all wait for the slower
    (finding,) = judged(Saving(None, 1000), [saving(1e9, 3), saving(1e9, 5)])
    assert "takes about 35 s" in finding.value


def test_a_save_that_was_measured_counts_for_more_than_how_fast_some_bytes_were():
    for lead, status in ((121, "ok"), (119, "warning"), (59, "error")):
        (finding,) = judged(Saving(None, lead), [saving(1e6, took=60.0), saving(1e6)])
        assert (finding.status, finding.exit_code) == (status, int(status == "error"))
        assert "took 60 s the last time" in finding.value


def shards(samples=100, shards=8, readers=4, fingerprint="f", bad=()):
    return {"samples": samples, "shards": shards, "readers": readers, "batch_size": 16, "looked_at": 4, "seconds": 0.1,
            "fingerprint": fingerprint, "bad": list(bad)}  # fmt: skip


def test_shards_are_the_same_everywhere_and_enough():
    assert wrong(judged(Shards(None), [shards(), shards()])) == []
    assert wrong(judged(Shards(None), [shards(), shards(fingerprint="g"), shards()])) == [("error", ("node2",))]
    assert wrong(judged(Shards(None), [shards(samples=15)])) == [("warning", ())]
    assert wrong(judged(Shards(None), [shards(samples=None, shards=3)])) == [("warning", ())]
    assert wrong(judged(Shards(None), [shards(samples=None, shards=4)])) == []
    assert wrong(judged(Shards(None), [shards(samples=None, shards=None)])) == []
    assert wrong(judged(Shards(None), [shards(bad=[("shard a", True)]), shards()])) == [("error", ("node1",))]


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ({"mode": "offline"}, "ok"),
        ({"mode": "disabled"}, "ok"),
        ({"mode": "online", "server": "s", "why": None, "logged_in": True}, "ok"),
        ({"mode": "online", "server": "s", "why": "refused", "logged_in": True}, "warning"),
        ({"mode": "online", "server": "s", "why": None, "logged_in": False}, "warning"),
    ],
)
def test_curves_need_a_server_and_a_login_when_online(value, status):
    (finding,) = judged(WeightsAndBiases(None), [value])
    assert finding.status == status
    assert ("logger.wandb.mode=offline" in finding.remedy) == (status == "warning")


def test_the_screen_names_a_few_nodes_and_counts_the_rest():
    text = screen([warning("clock", "late", "mend\nboth", [f"n{i}" for i in range(9)])], "title")
    assert text.splitlines() == [
        "title",
        "  warning  clock       late [n0, n1, n2, n3 and 5 more]",
        "                       -> mend",
        "                          both",
        "1 warning",
    ]


def test_numbers_for_people():
    assert [size_of(n) for n in (0, 999, 1000, 7.44e6, 2e15)] == ["0 B", "999 B", "1 kB", "7.44 MB", "2,000 TB"]
    assert [time_of(s) for s in (0.0123, 1.5, 99.4, 1234)] == ["12.3 ms", "1.5 s", "99.4 s", "1,234 s"]
