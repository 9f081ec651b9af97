"""Numbers that are not finite are seen for a whole batch at once, and each sample of them is replaced as any other."""

import numpy as np
import pytest
from streaming.making import END, indexed, member, npy
from streaming.test_damage_matrix import expected

from diffusion_trainer.streaming.arrays import Label, Latent
from diffusion_trainer.streaming.data import ShardData
from diffusion_trainer.streaming.loader import Layout

SHARDS, SAMPLES = 5, 12  # those of the matrix's `expected`
BAD = {(0, 3): np.nan, (1, 7): np.inf, (1, 8): -np.inf, (4, 11): np.nan}  # shard, sample


@pytest.mark.parametrize(("world", "micro_batches", "workers"), [(1, 1, 0), (2, 2, 0), (1, 1, 2)])
def test_they_are_replaced_and_counted_as_any_damage(tmp_path, world, micro_batches, workers):
    for k in range(SHARDS):
        data = b""
        for i in range(SAMPLES):
            latent = np.full((1, 2, 3), k * SAMPLES + i, np.float16)
            latent[0, 1, 2] = BAD.get((k, i), 0)
            key = f"{k * SAMPLES + i:06d}"
            data += member(f"{key}.latent.npy", npy(latent)) + member(f"{key}.cls", b"%d" % (k * SAMPLES + i))
        indexed(tmp_path / f"x-{k:03d}.tar", data + END)
    shards = ShardData({"image": Latent(1, 2, 3), "label": Label()}, f"{tmp_path}/*.tar", window=6, num_workers=workers)
    labels = expected(set(BAD), range(120))
    found = []
    for rank in range(world):
        layout = Layout(12, world, rank, micro_batches)
        for item, piece in enumerate(shards.loader(layout, 5, 4, 0, 10)):
            assert piece["label"].tolist() == [labels[n] for n in layout.numbers(item)]
            assert piece["image"][:, 0, 0, 0].tolist() == piece["label"].tolist()
            assert (piece["samples"] @ piece["samples"].new_tensor([SAMPLES, 1])).tolist() == piece["label"].tolist()
            found += piece["damage"]
    assert {f.kind for f in found} == {"undecodable"}
    assert sorted((int(f.shard[-5]), f.sample) for f in found) == sorted(2 * list(BAD))  # two epochs
