"""Buckets of sources: the sources keep their weights over all, and no shape makes a sample of one rarer or commoner."""

import json
from collections import Counter

import numpy as np
import pytest
from streaming.making import Number, Row, whole, write_set

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.buckets import Bucketed, bucketed
from diffusion_trainer.streaming.data import ShardData, Source
from diffusion_trainer.streaming.index import write_index
from diffusion_trainer.streaming.mixing import counts
from diffusion_trainer.streaming.scanning import scan, write_sidecars

SHAPES = [(64, 64), (64, 96), (96, 64)]
PERIOD, LANES, BATCH = 20, 2, 8


def made(sources: dict[str, list[list[int]]], weights, period=PERIOD, shapes=2) -> Bucketed:
    """sources: of each shard, the bucket of each sample."""
    assigned = {name: [np.array(shard, np.uint8) for shard in shards] for name, shards in sources.items()}
    return bucketed(assigned, weights, SHAPES[:shapes], BATCH, period, 3, LANES, 7)


def read(stream: Bucketed, steps: int) -> list[Counter]:
    """Of each step, how often each (source, shard, sample) came."""
    places = (stream(range(k * BATCH, (k + 1) * BATCH)) for k in range(steps))
    return [Counter(zip(*(p.tolist() for p in found), strict=True)) for found in places]


LOPSIDED = {"a": [[1] + [0] * 49], "b": [[0] * 4 + [1] * 36, [1] * 10]}


@pytest.mark.parametrize(
    ("sources", "weights"),
    [
        (LOPSIDED, [1.0, 1.0]),  # 2 % of a and 92 % of b are in bucket 1
        (LOPSIDED, [3.0, 1.0]),
        ({"a": [[0] * 40], "b": [[0] * 10, [1] * 10]}, [1.0, 1.0]),  # none of a
        ({"a": [[0] * 30 + [1] * 10], "b": [[0] * 15 + [1] * 15], "c": [[0, 1, 1]]}, [0.7, 0.2, 0.1]),
    ],
)
def test_sources_have_their_weights_and_each_sample_of_one_comes_equally_often(sources, weights):
    """Over so many steps that all parts are whole, but for what is shuffled within the last period of a lane."""
    steps = 4000
    times = sum(read(made(sources, weights), steps), Counter())
    for s, (shards, weight) in enumerate(zip(sources.values(), weights, strict=True)):
        n = sum(map(len, shards))
        wanted = steps * BATCH * weight / sum(weights) / n
        often = np.array([times[s, k, i] for k, shard in enumerate(shards) for i in range(len(shard))])
        assert abs(often.sum() / (steps * BATCH) - weight / sum(weights)) < 2 * LANES * PERIOD / (steps * BATCH)
        assert np.abs(often - wanted).max() < 0.05 * wanted + 2, (often, wanted)


def test_a_batch_is_of_one_bucket_and_each_has_its_part_of_every_period():
    """Single steps more or less, where the part is not whole."""
    stream = made(LOPSIDED, [1.0, 1.0])
    of = [np.concatenate(shards) for shards in LOPSIDED.values()]
    starts = [np.cumsum([0, *map(len, shards)]) for shards in LOPSIDED.values()]
    buckets = []
    for k, step in enumerate(read(stream, 10 * PERIOD)):
        (bucket,) = {int(of[s][starts[s][shard] + i]) for s, shard, i in step}
        assert bucket == stream.bucket(range(k * BATCH, (k + 1) * BATCH))
        buckets.append(bucket)
    ones = np.array(buckets).reshape(10, PERIOD).sum(1)
    exact = PERIOD * (0.02 + 0.92) / 2
    assert np.abs(ones - exact).max() < 1
    assert abs(ones.sum() - 10 * exact) < 1
    assert len(set(map(tuple, np.array(buckets).reshape(10, PERIOD)))) > 1


def test_a_source_with_less_than_a_sample_in_a_period_comes_at_its_time():
    """One of its 4,000 samples is in the bucket, where the other source has 5,000."""
    sources = {"a": [[1] + [0] * 3999], "b": [[1] * 5000]}
    steps = 30_000
    stream = made(sources, [1.0, 1.0])
    (lone,) = {k for k, part in enumerate(stream.buckets[1].mix.shares) if part == min(stream.buckets[1].mix.shares)}
    own = counts(steps * BATCH // 2 // PERIOD, PERIOD, stream.buckets[1].mix.shares)[lone]
    assert own == pytest.approx(steps * BATCH / 2 / 4001, abs=3)
    times = sum(read(made({"a": [[1] + [0] * 399], "b": [[1] * 500]}, [1.0, 1.0]), 4000), Counter())
    assert times[0, 0, 0] == pytest.approx(4000 * BATCH / 2 / 400, abs=2 * LANES)


def test_what_cannot_come_is_told():
    with pytest.raises(UserError, match="only 1 images are nearest to 64x96, too few for one step in 20"):
        made({"a": [[0] * 30 + [1]]}, [1.0])
    assert made({"a": [[0] * 30 + [1]]}, [1.0], period=31)
    with pytest.raises(UserError, match="only 0 images are nearest to 96x64"):
        made({"a": [[0, 1]]}, [1.0], shapes=3)
    with pytest.raises(UserError, match="source b has no samples"):
        made({"a": [[0, 1]], "b": [[]]}, [1.0, 1.0])


class Shaped(Row):
    def shaped(self, height, width):
        return (3,)


def test_the_sources_of_a_configuration_with_buckets(tmp_path):
    """The whole way from files, whoever reads: of equal weights, one has few samples in a shape and the other many."""
    wide = {"a": [True] + [False] * 9, "b": [False] + [True] * 9}
    for first, (name, shapes) in zip((0, 100), wide.items(), strict=True):
        (path,) = write_set(tmp_path / name, [10], "x", first)
        sizes = [(64, 96) if is_wide else (64, 64) for is_wide in shapes]
        found = scan(path)._replace(sizes=np.array(sizes, "<u4"))
        write_sidecars(path, found)
        write_index(path.parent, [found.shard(path.name)])
    data = ShardData(
        {"image": Shaped(), "label": Number()},
        sources={name: Source(f"{tmp_path}/{name}/*.tar", 1.0) for name in wide},
        mixing_period=10,
        buckets=SHAPES[:2],
    )
    labels = whole(data, 8, range(200), seed=1, lanes=2).labels
    assert (labels == whole(data, 8, range(200), 2, 2, seed=1, lanes=2).labels).all()
    times = Counter(labels.ravel().tolist())
    assert len(times) == 20
    assert max(abs(n - 80) for n in times.values()) <= 4, json.dumps(times)
