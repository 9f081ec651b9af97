"""Shards: what is written is read, and damage is named."""

import io
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.datamodule import Layout, ShardData
from diffusion_trainer.streaming.shards import find
from diffusion_trainer.streaming.writer import write_shards


def png(value: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).save(file, format="png")
    return file.getvalue()


def samples(n: int):
    return [{"__key__": f"{i:04d}", "png": png(i), "cls": str(i % 10).encode()} for i in range(n)]


@pytest.fixture
def shards(tmp_path):
    return write_shards(samples(50), tmp_path, "x", samples_per_shard=20)


def data(tmp_path, **changes) -> ShardData:
    settings = {"shards": f"{tmp_path}/x-*.tar", "channels": 1, "height": 8, "width": 8} | changes
    return ShardData(**settings)


def batches(source, world=1, rank=0, first=0, last=8, micro_batches=1):
    return list(source.loader(Layout(16, world, rank, micro_batches), seed=7, first_step=first, last_step=last))


def keys(batches):
    """(number in the stream, image, label) of every sample."""
    return [
        (b["first"] + i, int(b["image"][i, 0, 0, 0]), int(b["label"][i]))
        for b in batches
        for i in range(len(b["label"]))
    ]


def test_shards_hold_what_was_written_and_webdataset_reads_them(shards, tmp_path):
    assert [p.name for p in shards] == ["x-000000.tar", "x-000001.tar", "x-000002.tar"]
    read = list(webdataset.WebDataset([str(p) for p in shards], shardshuffle=False).decode("l8"))
    assert [int(s["png"][0, 0]) for s in read] == list(range(50))
    assert [int(s["cls"]) for s in read] == [i % 10 for i in range(50)]
    once = torch.cat([b["image"] for b in data(tmp_path).once(batch_size=7)])
    assert once[:, 0, 0, 0].tolist() == list(range(50))


def test_writing_again_gives_the_same_bytes_and_no_stale_shard(shards, tmp_path):
    before = [p.read_bytes() for p in shards]
    assert [p.read_bytes() for p in write_shards(samples(50), tmp_path, "x", 20)] == before
    write_shards(samples(10), tmp_path, "x", 20)
    assert [p.name for p in tmp_path.iterdir()] == ["x-000000.tar"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks_or_workers(shards, tmp_path, world, workers):
    whole = keys(batches(data(tmp_path)))
    ranks = [keys(batches(data(tmp_path, num_workers=workers), world, rank)) for rank in range(world)]
    assert sorted(k for rank in ranks for k in rank) == whole
    assert [n for n, _, _ in whole] == list(range(128))
    assert all(image % 10 == label for _, image, label in whole)


def test_a_restart_goes_on_with_the_very_next_sample(shards, tmp_path):
    whole = keys(batches(data(tmp_path)))
    assert keys(batches(data(tmp_path), last=3)) + keys(batches(data(tmp_path), first=3)) == whole


def test_micro_batches_are_the_batch_in_pieces(shards, tmp_path):
    pieces = batches(data(tmp_path), micro_batches=4)
    assert len(pieces) == 32
    assert keys(pieces) == keys(batches(data(tmp_path)))


def test_ranks_share_the_reference_without_overlap(shards, tmp_path):
    parts = [torch.cat([b["image"] for b in data(tmp_path).once(7, rank, 3)])[:, 0, 0, 0].tolist() for rank in range(3)]
    assert parts[1] == list(range(1, 50, 3))
    assert sorted(x for part in parts for x in part) == list(range(50))


def test_braces_lists_and_globs_name_shards(shards, tmp_path):
    assert find(f"{tmp_path}/x-{{000000..000002}}.tar") == shards
    assert find([str(shards[1]), f"{tmp_path}/x-*2.tar"]) == shards[1:]


def refused(tmp_path, match, **changes):
    source = data(tmp_path, **changes)
    with pytest.raises(UserError, match=match):
        list(source.once(8))


def test_missing_shards_are_named(tmp_path):
    refused(tmp_path, r"no file matches .*x-\*\.tar")


def test_an_empty_shard_is_named(shards, tmp_path):
    tarfile.open(shards[1], "w").close()
    refused(tmp_path, "x-000001.tar is empty")
    shards[1].write_bytes(b"")
    refused(tmp_path, "x-000001.tar")


@pytest.mark.parametrize("at", [0.3, 0.5, 0.77])
def test_a_shard_cut_anywhere_is_named(shards, tmp_path, at):
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: int(len(whole) * at)])
    refused(tmp_path, "x-000001.tar is (truncated|damaged)")


def test_a_shard_cut_between_members_is_named(shards, tmp_path):
    """webdataset, and tarfile, take it for a whole one."""
    with tarfile.open(shards[1]) as tar:
        member = tar.getmembers()[10]
    shards[1].write_bytes(shards[1].read_bytes()[: member.offset])
    assert len(list(webdataset.WebDataset(str(shards[1]), shardshuffle=False))) == 5
    refused(tmp_path, "x-000001.tar is truncated")


def test_what_is_no_tar_is_named(shards, tmp_path):
    shards[2].write_bytes(b"<html>404</html>" * 1000)
    refused(tmp_path, "x-000002.tar is damaged")


def test_a_sample_without_a_label_is_named_with_what_it_has(tmp_path):
    write_shards([{"__key__": "a", "png": png(1), "txt": b"no"}], tmp_path, "x", 10)
    refused(tmp_path, r"sample a has no label: expected a member a\.cls, found \.png, \.txt")
    assert "label" not in next(iter(data(tmp_path, label=None).once(8)))


@pytest.mark.parametrize(
    ("sample", "match"),
    [
        ({"png": b"not a picture", "cls": b"1"}, "cannot be decoded"),
        ({"png": png(1)[:45], "cls": b"1"}, "cannot be decoded"),
        ({"png": png(1), "cls": b"seven"}, "label cannot be decoded .*seven"),
        ({"png": png(1, size=9), "cls": b"1"}, r"image of \(9, 9\) pixels"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(tmp_path, sample, match):
    write_shards([{"__key__": "a", **sample}], tmp_path, "x", 10)
    refused(tmp_path, match)


def test_a_pickle_in_a_shard_is_never_opened(tmp_path):
    write_shards(
        [{"__key__": "a", "png": png(1), "cls": b"1", "pyd": b"cos\nsystem\n(S'touch hacked'\ntR."}], tmp_path, "x", 10
    )
    list(data(tmp_path).once(8))
    assert not (tmp_path / "hacked").exists()


def test_remote_shards_are_refused_with_the_way_out():
    for name in ("s3://bucket/x.tar", "pipe:cat x.tar"):
        with pytest.raises(UserError, match="not a local path"):
            find(name)


def test_workers_outlive_a_stop_that_reaches_every_process(shards, tmp_path):
    """srun signals them too, but the rank needs them until it has saved."""
    import multiprocessing
    import os
    import signal

    loader = data(tmp_path, num_workers=2).loader(Layout(16), seed=7, first_step=0, last_step=40)
    iterator = iter(loader)
    got = [next(iterator), next(iterator)]  # one from each worker: both are up
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    got += list(iterator)
    assert keys(got) == keys(batches(data(tmp_path), last=40))


def test_an_error_in_a_worker_keeps_its_message(tmp_path):
    write_shards([{"__key__": str(i), "png": b"broken", "cls": b"1"} for i in range(16)], tmp_path, "x", 100)
    (batch,) = batches(data(tmp_path, num_workers=1), last=1)
    assert "cannot be decoded" in batch["error"]


def test_a_key_that_is_there_twice_is_named(tmp_path):
    with tarfile.open(tmp_path / "x-0.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("a.png")
            info.size = len(png(1))
            tar.addfile(info, io.BytesIO(png(1)))
    refused(tmp_path, "a.png is in it twice", label=None)
