"""What many ranks wrote in pieces becomes one file with the same bits, in memory that does not grow with the model."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion_trainer.conventions import UserError
from diffusion_trainer.training import consolidation
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.checkpoint_files import header
from diffusion_trainer.training.checkpoints import Checkpoint, save
from diffusion_trainer.training.consolidation import consolidate, kinds_of
from diffusion_trainer.training.sharding import Sharding, Slot

RANKS = 3
KINDS = ("weight", "ema", "ema.long", "exp_avg")
SHAPES = {"scalar": (), "bias": (5,), "conv.weight": (4, 3, 3, 3), "empty": (0, 2), "linear.weight": (11, 7)}


class Together(Agreement):
    """Threads that stand for ranks."""

    def __init__(self, rank, world, shared, barrier):
        super().__init__()
        self.rank, self.world, self.shared, self.barrier = rank, world, shared, barrier

    def gather(self, value):
        self.shared[self.rank] = value
        self.barrier.wait(60)
        values = [self.shared[rank] for rank in range(self.world)]
        self.barrier.wait(60)
        return values


@dataclass
class Part(Sharding):
    """A rank's part of all parameters laid end to end, as ZeRO cuts them: ends fall inside of parameters."""

    model: torch.nn.Module
    torch_optimizer: torch.optim.Optimizer
    master: torch.Tensor
    begin: int
    replicated = False

    @property
    def optimizer(self):
        return self.torch_optimizer

    def masters(self):
        return [self.master]

    def publish(self):
        raise AssertionError("nothing is published here")

    def slots(self):
        at = 0
        for name, p in self.model.named_parameters():
            low, high = max(at, self.begin), min(at + p.numel(), self.begin + self.master.numel())
            if low < high:
                yield Slot(name, low - at, high - low, self.master, low - self.begin)
            at += p.numel()


class Named(torch.nn.Module):
    def __init__(self, shapes):
        super().__init__()
        for name, shape in shapes.items():
            owner, _, leaf = name.rpartition(".")
            if owner and owner not in dict(self.named_children()):
                self.add_module(owner, torch.nn.Module())
            self.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(torch.empty(shape, device="meta")))


def written(folder, shapes, flat):
    """A checkpoint of RANKS files; flat: kind -> all parameters' elements, end to end, in the model's order."""
    model, barrier, shared = Named(shapes), threading.Barrier(RANKS), {}
    size = -(-len(flat["weight"]) // RANKS)

    def rank(number):
        runs = {kind: values[number * size : (number + 1) * size] for kind, values in flat.items()}
        master = runs.pop("weight").clone()
        optimizer = torch.optim.Adam([master.requires_grad_()])
        optimizer.state[master] = {**runs, "step": torch.tensor(1.0)}
        return save(folder, 64, Part(model, optimizer, master, number * size), {},
                    Together(number, RANKS, shared, barrier), 1)  # fmt: skip

    with ThreadPoolExecutor(RANKS) as pool:
        return next(iter(pool.map(rank, range(RANKS))))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A checkpoint, and kind -> name -> what it must hold; with -0, NaN, infinities and the smallest number."""
    names = [name for name, _ in Named(SHAPES).named_parameters()]
    counts = [torch.Size(SHAPES[name]).numel() for name in names]
    flat = {kind: torch.randn(sum(counts), generator=torch.Generator().manual_seed(i)) for i, kind in enumerate(KINDS)}
    flat["ema.long"][40:45] = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 1e-45])
    folder = written(tmp_path_factory.mktemp("run"), SHAPES, flat)
    cut = {kind: dict(zip(names, values.split(counts), strict=True)) for kind, values in flat.items()}
    truth = {kind: {n: part.reshape(SHAPES[n]) for n, part in parts.items()} for kind, parts in cut.items()}
    return Checkpoint(folder), truth


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_the_file_has_the_bits_of_every_parameter_whoever_wrote_them(known, tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(consolidation, "CHUNK", chunk)
    checkpoint, truth = known
    assert len(checkpoint.manifest["files"]) == RANKS
    path = tmp_path / "out.safetensors"
    size = consolidate(checkpoint, kind, path, torch.float32, {"whose": "ours, „quoted“"})
    found, whole = load_file(path), checkpoint.whole(kind)
    assert found.keys() == truth[kind].keys() == whole.keys() == SHAPES.keys()
    for name, expected in truth[kind].items():
        assert found[name].shape == SHAPES[name]
        assert found[name].dtype == torch.float32
        assert torch.equal(bits(found[name]), bits(expected)), name
        assert torch.equal(bits(found[name]), bits(whole[name])), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"whose": "ours, „quoted“"}
    assert path.stat().st_size == size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(known, tmp_path, dtype):
    checkpoint, truth = known
    for kind in ("weight", "ema.long"):  # the latter has infinities and a NaN of its own, which stay
        path = tmp_path / f"{kind}.safetensors"
        consolidate(checkpoint, kind, path, dtype, {})
        found = load_file(path)
        for name, expected in truth[kind].items():
            assert found[name].dtype == dtype
            assert torch.equal(bits(found[name]), bits(expected.to(dtype))), name


def test_a_number_that_does_not_fit_is_not_made_infinite(known, tmp_path, monkeypatch):
    checkpoint, _ = known
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda *of: read(*of) * (1e6 if of[1] == "bias" else 1))
    with pytest.raises(UserError, match=r"bias has a number beyond 6.55e\+04, the largest of torch.float16: use fp32"):
        consolidate(checkpoint, "weight", tmp_path / "out", torch.float16, {})
    consolidate(checkpoint, "weight", tmp_path / "out", torch.bfloat16, {})


def test_moments_are_no_weights(known):
    assert kinds_of(known[0]) == ["ema", "ema.long", "weight"]


def test_no_more_than_a_chunk_is_asked_for_and_everything_once(known, tmp_path, monkeypatch):
    checkpoint, asked = known[0], []
    read = checkpoint.read
    monkeypatch.setattr(consolidation, "CHUNK", 10)
    monkeypatch.setattr(checkpoint, "read", lambda *of: asked.append(of) or read(*of))
    consolidate(checkpoint, "ema", tmp_path / "out", torch.float32, {})
    elements = [(name, first + i) for _, name, first, count in asked for i in range(count)]
    assert len(elements) == len(set(elements)) == sum(torch.Size(s).numel() for s in SHAPES.values())
    assert max(count for *_, count in asked) == 10


@pytest.mark.parametrize("length", range(8))
def test_numbers_begin_where_a_reader_may_map_them(length):
    text = header({"a": (torch.float16, [2])}, {"k": "x" * length})
    assert len(text) % 8 == 0
    assert int.from_bytes(text[:8], "little") == len(text) - 8
    with pytest.raises(ValueError, match=r"torch.float64 cannot be written; torch.float32, torch.bfloat16"):
        header({"a": (torch.float64, [2])})


def test_a_checkpoint_that_lacks_elements_is_refused(known, tmp_path, monkeypatch):
    checkpoint = Checkpoint(known[0].folder)
    monkeypatch.setattr(checkpoint, "shapes", {**checkpoint.shapes, "bias": torch.Size([500])})
    with pytest.raises(UserError, match="of 500 elements of weight of bias"):
        consolidate(checkpoint, "weight", tmp_path / "out", torch.float32, {})


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from diffusion_trainer.training.checkpoints import Checkpoint
from diffusion_trainer.training.consolidation import consolidate

def anonymous():  # kB that are this process's own: pages of mapped files are the system's to drop
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

torch.set_num_threads(1)
consolidate(Checkpoint(Path(sys.argv[2])), "ema", Path(sys.argv[3]), torch.bfloat16, {})  # what is loaded once
checkpoint, seen, done = Checkpoint(Path(sys.argv[1])), [], threading.Event()
def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.0005)
before, watcher = anonymous(), threading.Thread(target=watch)
watcher.start()
consolidate(checkpoint, "ema", Path(sys.argv[3]), getattr(torch, sys.argv[4]), {})
done.set()
watcher.join()
print(len(seen), max(seen) - before)
"""


@pytest.mark.slow
def test_memory_is_at_most_that_of_the_largest_tensor(known, tmp_path):
    """A checkpoint of 200 MB, half of it averages; in a process of its own, on top of what it has loaded."""
    largest = 5 << 20  # elements, 20 MB
    shapes = {f"p{i}": (largest >> 10, 1 << 10) for i in range(5)}
    average = torch.randn(5 * largest, generator=torch.Generator().manual_seed(0))
    folder = written(tmp_path / "run", shapes, {"weight": average, "ema": average})
    assert sum(p.stat().st_size for p in folder.iterdir()) > 200e6
    for dtype in ("float32", "bfloat16"):
        path = tmp_path / f"{dtype}.safetensors"
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder), str(known[0].folder), str(path), dtype],
            cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        samples, kilobytes = map(int, result.stdout.split())
        assert samples > 20
        assert kilobytes * 1024 <= 1.1 * 4 * largest, f"{dtype}: {kilobytes} kB"
        print(f"{dtype}: {kilobytes / 1024:.1f} MB more, largest tensor {4 * largest / 2**20:.1f} MB")
    found = load_file(tmp_path / "float32.safetensors")
    assert all(torch.equal(found[f"p{i}"].reshape(-1), average[i * largest :][:largest]) for i in range(5))
