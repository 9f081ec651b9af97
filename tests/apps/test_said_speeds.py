"""How fast shards are read, as `diffusion-trainer index` and `inspect` say it."""

import itertools
import re

import pytest
from streaming.making import write_set

from diffusion_trainer.apps import index, inspect
from diffusion_trainer.streaming import inspecting


def test_an_index_in_the_making_says_shards_bytes_and_speed_every_few_seconds(tmp_path, capsys, monkeypatch):
    """The clock goes on by 1/512 s a shard: of six, a line is due after each third."""
    paths = write_set(tmp_path, [5] * 6)
    clock = itertools.count(0, 1 / 512)
    monkeypatch.setattr(index.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(index, "SAY_EVERY_SECONDS", 3 / 512)
    assert index.main([f"{tmp_path}/*.tar", "again=true", "processes=1"]) == 0
    said = re.findall(r"^  ([\d,]+) shards, ([\d.]+) GB, (\d+) MB/s$", capsys.readouterr().out, re.MULTILINE)
    size = sum(path.stat().st_size for path in paths)
    assert said == [(str(k), f"{size * k / 6e9:.1f}", f"{size * k / 6 / 1e6 / (k / 512):.0f}") for k in (3, 6)]


@pytest.mark.parametrize("seconds", [0.5, 0.125])
def test_an_inspection_says_how_many_samples_a_second_it_reads_and_decodes(tmp_path, capsys, monkeypatch, seconds):
    write_set(tmp_path, [5] * 4)
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(inspecting, "perf_counter", lambda: next(clock))
    assert inspect.main([str(tmp_path), "out=null", "processes=1", "num_samples=8"]) == 0
    assert f"speed: {1 / seconds:,.0f} samples/s" in capsys.readouterr().out
