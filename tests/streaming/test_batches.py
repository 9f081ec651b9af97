"""Any world, any workers, any restarts: the same global batches."""

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming.making import Number, Row, Text, Whole, pieces, row, shard_data, theorem, whole, write_set

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.data import Source
from diffusion_trainer.streaming.fields import SampleDraws
from diffusion_trainer.streaming.loader import Layout
from diffusion_trainer.streaming.mixing import Mix
from diffusion_trainer.streaming.order import Order
from diffusion_trainer.streaming.stores import LocalStore

WORLDS = (1, 2, 4, 8)
COUNTS = st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any)
ORDER = {"seed": 3, "lanes": 4}


def joined(parts: list[Whole]) -> Whole:
    arrays = (np.concatenate([getattr(p, name) for p in parts]) for name in ("labels", "rows", "samples"))
    return Whole(*arrays, sorted(f for p in parts for f in p.found))


@st.composite
def sources(draw) -> list[tuple[list[int], float]]:
    """Samples of the shards and weight of each source."""
    return draw(st.lists(st.tuples(COUNTS, st.sampled_from([1.0, 2.5, 3.0])), min_size=1, max_size=3))


NUMBERS = st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(7, 12), st.integers(0, 9))
BATCHES = st.sampled_from([8, 16, 24])


def layouts_and_restarts_agree(sets, numbers, batch, workers, data) -> None:
    (lanes, window, period, seed), names = numbers, "abc"[: len(sets)]
    start = data.draw(st.integers(0, 50))
    steps = range(start, start + 6)
    cuts = sorted(data.draw(st.lists(st.integers(steps.start, steps.stop), max_size=3)))
    order = {"seed": seed, "lanes": lanes}
    with TemporaryDirectory() as folder:
        mixed = {name: Source(f"{folder}/{name}/*.tar", weight) for name, (_, weight) in zip(names, sets, strict=True)}
        for k, (name, (counts, _)) in enumerate(zip(names, sets, strict=True)):
            write_set(Path(folder) / name, counts, first=1000 * k, width=3)

        def read(part: range, workers: int = 0, **layout) -> Whole:
            options = {"window": window, "mixing_period": period, "num_workers": workers, "prefetch": 1}
            return whole(shard_data(None, sources=mixed, **options), batch, part, **layout, **order)

        truth, parts = read(steps), []
        for a, b in zip([steps.start, *cuts], [*cuts, steps.stop], strict=True):
            world = data.draw(st.sampled_from(WORLDS))
            micro_batches = data.draw(st.sampled_from([m for m in (1, 2, 4) if batch % (world * m) == 0]))
            many = data.draw(st.sampled_from(workers))
            parts.append(read(range(a, b), many, world=world, micro_batches=micro_batches))
    assert joined(parts) == truth
    assert not truth.found


@theorem(40)
@given(sources(), NUMBERS, BATCHES, st.data())
def test_any_layout_and_any_restarts_give_the_same_global_batches(sets, numbers, batch, data):
    layouts_and_restarts_agree(sets, numbers, batch, (0,), data)


@pytest.mark.slow
@theorem(8)
@given(sources(), NUMBERS, BATCHES, st.data())
def test_any_layout_any_workers_and_any_restarts_give_the_same_global_batches(sets, numbers, batch, data):
    layouts_and_restarts_agree(sets, numbers, batch, (0, 1, 2), data)


@theorem(30)
@given(COUNTS, st.integers(1, 9), st.integers(1, 30), st.integers(0, 2))
def test_batches_are_the_samples_of_the_order_and_each_comes_once_an_epoch(counts, lanes, window, epoch):
    total = sum(counts)
    with TemporaryDirectory() as folder:
        write_set(Path(folder), counts)
        got = whole(shard_data(f"{folder}/*.tar", window=window), total, range(epoch, epoch + 1), seed=1, lanes=lanes)
    assert sorted(got.labels[0]) == list(range(total))
    assert (got.rows[0] == got.labels[0][:, None] + np.arange(3)).all()
    places = Mix([Order(np.array(counts), 1, "shards", lanes, window)], [1])(range(epoch * total, (epoch + 1) * total))
    assert got.samples[0].tolist() == np.stack([places.shard, places.sample], 1).tolist()
    starts = np.cumsum([0, *counts])
    assert got.labels[0].tolist() == (starts[places.shard] + places.sample).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Unequal shards, one of them empty."""
    folder = tmp_path_factory.mktemp("set")
    write_set(folder, [17, 3, 0, 40, 1, 8])
    return folder


def test_a_changed_batch_size_goes_on_in_the_same_stream(folder):
    data = shard_data(f"{folder}/*.tar", window=8)
    stream = whole(data, 8, range(0, 24), **ORDER).labels.ravel()
    assert whole(data, 8, range(0, 6), world=2, **ORDER).labels.ravel().tolist() == stream[:48].tolist()
    assert whole(data, 16, range(3, 6), world=4, **ORDER).labels.ravel().tolist() == stream[48:96].tolist()
    assert whole(data, 48, range(2, 4), world=8, **ORDER).labels.ravel().tolist() == stream[96:].tolist()


@pytest.mark.parametrize("changed", [{"seed": 1}, {"lanes": 5}, {"window": 3}])
def test_the_seed_the_lanes_and_the_window_are_part_of_the_order(folder, changed):
    def labels(seed=0, lanes=4, window=8):
        return whole(shard_data(f"{folder}/*.tar", window=window), 48, range(1), seed=seed, lanes=lanes).labels.tolist()

    assert labels() == labels()
    assert labels() != labels(**changed)


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_make_the_batches_that_a_process_alone_makes(folder, workers):
    one = whole(shard_data(f"{folder}/*.tar", window=8), 16, range(5, 15), **ORDER)
    data = shard_data(f"{folder}/*.tar", window=8, num_workers=workers, prefetch=1)
    assert whole(data, 16, range(5, 15), world=2, micro_batches=2, **ORDER) == one


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world", WORLDS)
def test_worlds_and_workers_of_two_sources_with_restarts(folder, tmp_path, world, workers):
    write_set(tmp_path, [9, 4], "y", 1000)
    sources = {"a": Source(f"{folder}/*.tar", 3.0), "b": Source(f"{tmp_path}/*.tar", 1.0)}
    alone, data = (
        shard_data(None, sources=sources, window=8, mixing_period=10, num_workers=w, prefetch=2) for w in (0, workers)
    )
    truth = whole(alone, 32, range(40, 60), **ORDER)
    parts = [whole(data, 32, range(a, b), world, **ORDER) for a, b in ((40, 43), (43, 44), (44, 60))]
    assert joined(parts) == truth
    assert {n >= 1000 for n in truth.labels.ravel().tolist()} == {True, False}


@pytest.mark.parametrize("counts", [[1], [2, 1], [0, 0, 3], [40, 1, 1, 1]])
@pytest.mark.parametrize("workers", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_few_samples_shards_and_lanes_are_equal_steps_on_every_rank(tmp_path, counts, workers):
    """One sample; fewer shards than workers; fewer samples than lanes, than a batch: every rank has all its steps."""
    write_set(tmp_path, counts)
    data = shard_data(f"{tmp_path}/*.tar", num_workers=workers, prefetch=1)
    got = whole(data, 8, range(3), world=2, seed=0, lanes=16)
    labels, total = got.labels.ravel(), sum(counts)
    for epoch in range(24 // total):
        assert sorted(labels[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert set(labels[24 // total * total :].tolist()) <= set(range(total))


def test_without_samples_it_is_refused(tmp_path):
    write_set(tmp_path, [0, 0])
    data = shard_data(f"{tmp_path}/*.tar")
    with pytest.raises(UserError, match="no samples"):
        data.loader(Layout(8), 0, 4, 0, 2)
    with pytest.raises(UserError, match="no samples"):
        data.first(3)


@pytest.mark.parametrize("world", [1, 4])
def test_objects_and_their_draws_belong_to_the_number(folder, world):
    """Text travels as a list; what is drawn for a sample is a function of the seed and its number alone."""
    fields = {"image": Row(), "label": Number(), "text": Text()}
    data = shard_data(f"{folder}/*.tar", fields=fields, window=8)
    seen = {}
    for rank in range(world):
        for piece in pieces(data, Layout(8, world, rank), range(2, 22), **ORDER):
            numbers = Layout(8, world, rank).numbers(piece["first"] // 8)
            for number, label, text in zip(numbers, piece["label"].tolist(), piece["text"], strict=True):
                seen[number] = (label, *text.split())
    assert sorted(seen) == list(range(16, 176))
    assert all(int(label) == int(name) and n == int(number) for n, (label, name, number, _) in seen.items())
    draws = {n: float(u) for n, (*_, u) in seen.items()}
    assert len(set(draws.values())) == 160
    assert 0.4 < np.mean(list(draws.values())) < 0.6
    expected = Text().decode(memoryview(b"x"), None, SampleDraws(ORDER["seed"], 16))
    assert expected.split()[2] == str(draws[16])


def test_what_a_batch_holds(folder):
    data = shard_data(f"{folder}/*.tar")
    (piece,) = pieces(data, Layout(4), range(1))
    assert set(piece) == {"image", "label", "first", "samples", "damage"}
    assert [row(n).tolist() for n in piece["label"].tolist()] == piece["image"].tolist()
    assert (piece["label"].dtype, piece["image"].shape, piece["damage"]) == (piece["samples"].dtype, (4, 3), [])
    kept = piece["image"].clone()
    list(data.loader(Layout(4), 0, 4, 1, 9))
    assert (piece["image"] == kept).all()  # it is no view of what is written again


@pytest.mark.parametrize(("batch", "world", "micro_batches"), [(32, 3, 2), (8, 16, 1), (6, 2, 2)])
def test_a_batch_that_does_not_divide_is_refused_with_what_would(batch, world, micro_batches):
    with pytest.raises(UserError, match=f"multiple of {world * micro_batches}"):
        Layout(batch, world, 0, micro_batches)


@theorem(100)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**9))
def test_pieces_are_every_Pth_place(world, micro_batches, size, step):
    count = world * micro_batches
    layouts = [Layout(count * size, world, rank, micro_batches) for rank in range(world)]
    cut = [layout.numbers(step * micro_batches + m) for layout in layouts for m in range(micro_batches)]
    assert {len(numbers) for numbers in cut} == {size}
    first = step * count * size
    assert [numbers[0] - first for numbers in cut] == list(range(count))
    assert sorted(n for numbers in cut for n in numbers) == list(range(first, first + count * size))


@dataclass
class Listening(LocalStore):
    steps_ahead = 2
    told: list = field(default_factory=list)
    sidecars: list = field(default_factory=list)  # URLs of shards, and how much had been read before
    reads: list = field(default_factory=list)  # what is read, and how much had been told before

    def prefetch(self, pieces):
        self.told += pieces

    def sidecar(self, shard, suffix):
        self.sidecars.append((shard.url, len(self.reads)))
        return super().sidecar(shard, suffix)

    def read(self, shard, offset, into):
        self.reads.append(((shard, offset, offset + len(into)), len(self.told)))
        super().read(shard, offset, into)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("first_step", [0, 3])
def test_what_is_read_was_announced_some_steps_before_or_at_the_start(folder, micro_batches, first_step):
    store, layout = Listening(), Layout(8, micro_batches=micro_batches)
    pieces(shard_data(f"{folder}/*.tar", store=store), layout, range(first_step, first_step + 5))
    assert [piece for piece, _ in store.reads] == store.told[: 5 * 8]  # in the order of reading, each once
    size, ahead = layout.size, store.steps_ahead * 8 + layout.size
    told = [told for _, told in store.reads]
    assert told[:size] == [size] * size  # the first batch waits for no other's index files
    assert told[size:] == [k // size * size + ahead for k in range(size, 5 * 8)]


def test_the_first_batch_waits_for_its_own_index_files_alone(folder):
    store = Listening()
    data = shard_data(f"{folder}/*.tar", store=store)
    batches = iter(data.loader(Layout(2), 0, 4, 0, 8))
    next(batches)
    assert {url for url, _ in store.sidecars} == {shard.url for (shard, *_), _ in store.reads}
    assert len(store.reads) == 2
