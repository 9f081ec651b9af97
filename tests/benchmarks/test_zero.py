"""benchmarks/zero.py counts what it says it counts, and ZeRO meets its formulas on two ranks."""

import importlib
import socket

import pytest
import tiny
import torch
from conftest import ROOT
from torch import distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training.ema import attach_ema
from diffusion_trainer.training.nonfinite import NonFinite
from diffusion_trainer.training.sharding import Replicated

MEMORY, TRAFFIC = 0.05, 0.03  # how far off the formulas at most


@pytest.fixture(scope="module")
def script():
    """benchmarks/zero.py, which is no package and imports what lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("zero")


@pytest.fixture(scope="module")
def probes(script):
    return importlib.import_module("zero_probes")


@pytest.fixture
def four_ranks():
    """A process group whose collectives do nothing."""
    distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    distributed.destroy_process_group()


def test_collectives_are_counted_as_rings(probes, four_ranks):
    whole, part = torch.zeros(1000), torch.zeros(250)
    expected = {"allreduce_": 6000, "_allgather_base_": 3000, "_reduce_scatter_base_": 3000, "allgather_": 3000,
                "broadcast_": 3000, "reduce_": 3000, "barrier": 0}  # fmt: skip
    with probes.Collectives() as collectives:
        distributed.all_reduce(whole)
        distributed.all_gather_into_tensor(whole, part)
        distributed.reduce_scatter_tensor(part, whole)
        distributed.all_gather(list(whole.split(250)), part)
        distributed.broadcast(whole, 0)
        distributed.reduce(whole, 1)
        distributed.barrier()
    assert collectives.sent == expected


def test_an_unknown_collective_is_an_error(probes, four_ranks):
    with pytest.raises(KeyError, match="alltoall_base_"), probes.Collectives():
        distributed.all_to_all_single(torch.zeros(4), torch.zeros(4))


def test_activations_are_what_backward_needs_and_no_weights(probes):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.Sigmoid())
    activations = probes.Activations(net.parameters())
    with activations:
        out = net(torch.zeros(11, 3, requires_grad=True))
        out.sum().backward()
    # Into the first layer, out of tanh (which is also what the second needs), out of the sigmoid.
    assert activations.peak == 4 * 11 * (3 + 5 + 7)
    assert activations.bytes == 0


def test_bytes_on_the_wire_are_those_of_sockets(probes):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as here:
        there, _ = server.accept()
        with there:
            before = probes.bytes_on_wire()
            here.sendall(bytes(100_000))
            received = 0
            while received < 100_000:
                received += len(there.recv(100_000))
            assert probes.bytes_on_wire() - before == 100_000
            assert (probes.sent_by(here.fileno()), probes.sent_by(there.fileno())) == (100_000, 0)


def test_memory_of_one_process_is_the_formula_of_stage_0(script, probes):
    net = nn.Linear(30, 50)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    attach_ema(optimizer, {"ema": lambda: 0.5, "ema.other": lambda: 0.9}, NonFinite(optimizer))
    net(torch.zeros(2, 30)).sum().backward()
    optimizer.step()
    loose = torch.zeros(100)
    got = probes.memory(net, Replicated(net, optimizer), [net.weight.view(-1), loose, loose[3:]])
    expected = script.paper(0, 1, 30 * 50 + 50, averages=2, activations=0)
    assert {name: got[name] for name in script.KINDS if name != "activations"} | {
        "activations": 0,
        "sent": 0,
    } == expected
    assert (got["other"], got["gathered"], got["buckets"]) == (4 * 100, 0, 0)


@pytest.mark.parametrize("wrong", ["--ranks=0", "--ranks=2,x", "--only=zero4", "--json=/no/such/folder/a"])
def test_flags_are_checked(script, wrong):
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        script.main(["experiment=digits", wrong])


@pytest.mark.slow
def test_zero_keeps_and_sends_what_the_formulas_say(script, tmp_path):
    overrides = [*tiny.overrides(tmp_path), "network.base_channels=64"]
    whole = script.run("ddp", 1, overrides)["memory"]["activations"]
    for name in ("ddp", "zero1-limits", "zero2-limits", "zero3-limits"):
        row = script.compared(name, script.run(name, 2, overrides), whole)
        assert row["parameters"] > 1e6
        assert row["parameters"] % 4
        got = row["memory"] | {"sent": sum(row["sent"].values())}
        for kind in [*script.KINDS, "sent"]:
            near = TRAFFIC if kind == "sent" else MEMORY
            assert got[kind] == pytest.approx(row["deepspeed"][kind], rel=near), (name, kind)
            if kind != "gradients":  # see the benchmark's head
                assert got[kind] == pytest.approx(row["paper"][kind], rel=near), (name, kind)
        assert got["gradients"] < (1 + MEMORY) * (row["paper"]["gradients"] + 4 * row["largest"])
        assert got["buckets"] < MEMORY * got["weights"] + 2 * 4 * row["parameters"] // 16
        assert got["other"] < MEMORY * got["weights"]
        assert got["sent"] < row["wire"] * (1 + TRAFFIC)
