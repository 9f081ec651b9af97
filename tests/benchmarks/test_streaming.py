"""benchmarks/streaming.py measures what it says: all contenders read the same samples, all their processes count."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from importlib.metadata import distributions
from itertools import islice

import numpy as np
import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # it starts the workers of every contender
FOLDER = ROOT / "benchmarks"


def sibling(name: str):
    """A script of benchmarks/, which is no package."""
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(f"{name}_benchmark", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path = path
    return module


@pytest.fixture(scope="module")
def script():
    return sibling("streaming")


def test_the_libraries_are_not_the_scripts():
    """MosaicML's package has the name of one of them."""
    code = "import streaming_contenders, sys; print(any(p.endswith('benchmarks') for p in sys.path))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{FOLDER}:{ROOT}"},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "False\n"


@pytest.fixture(scope="module")
def small(script, tmp_path_factory):
    """Of each set: 48 samples in batches of 2, its folder with the formats whose libraries are there, what it holds."""
    folder, sets = tmp_path_factory.mktemp("sets"), {}
    for name, s in script.SETS.items():
        s = replace(s, count=48, batch=2, per_shard=12, make=cache(s.make))
        (folder / name).mkdir()
        script.make(s, folder / name)
        expected = {(y, np.ascontiguousarray(s.ours(x)).tobytes()) for x, y in s.samples()}
        assert len(expected) == 48
        sets[name] = s, folder / name, expected
    return sets


def contents(s, batches) -> set[tuple[int, bytes]]:
    found = set()
    for batch in batches:
        images, labels = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
        images = np.moveaxis(np.asarray(images), 1, -1) if images.shape[1] == 3 else np.asarray(images)
        found |= {(int(y), np.ascontiguousarray(x).tobytes()) for x, y in zip(images, labels, strict=True)}
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["latents", "jpeg"])
@pytest.mark.parametrize("name", ["ours", "ours, data=webdataset", "webdataset", "webdataset, our decoder"])
def test_contenders_give_whole_batches_of_the_samples(script, small, name, kind, workers):
    s, folder, expected = small[kind]
    batches = script.CONTENDERS[name](s, folder, workers)()
    first = next(batches)
    script.check(first, s)
    found = contents(s, [first, *islice(batches, 10)])
    assert len(found) > 6
    assert found <= expected


@pytest.mark.parametrize("where", ["here", "remote"])
def test_memory_is_that_of_the_workers_and_of_this_process(script, small, where):
    memory = sibling("streaming_memory")
    s, folder, _ = small["latents"]
    shards = sorted((folder / "tar").glob("*.tar"))
    with memory.served(shards) if where == "remote" else memory.local(shards) as (urls, store):
        rows = list(memory.rows(s, urls, store, 200))
    assert [row[0] for row in rows] == [20 * k for k in range(1, 11)]
    assert all(1 < own < 4096 for _, *values in rows for own in values[:2])


@pytest.mark.parametrize("name", ["MosaicML Streaming", "LitData", "LitData, batch_decode=256"])
def test_other_contenders_too_if_they_are_installed(script, small, name):
    library = "mosaicml-streaming" if name.startswith("Mosaic") else "litdata"
    if not list(distributions(name=library)):
        pytest.skip(f"{library} is not installed")
    for s, folder, expected in small.values():
        assert contents(s, islice(script.CONTENDERS[name](s, folder, 0)(), 10)) <= expected


def test_pictures_are_as_large_as_photographs(script):
    sizes = [len(script.SETS["jpeg"].make(i)) for i in range(8)]
    assert 18_000 < np.mean(sizes) < 26_000


def test_the_time_of_children_counts(script):
    begin, child = script.cpu_seconds(), os.fork()
    if not child:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        os._exit(0)
    os.waitpid(child, 0)
    assert script.cpu_seconds() - begin >= 0.29


def test_one_run_of_ours_and_of_the_limit(script, small):
    s, folder, _ = small["jpeg"]
    found = script.measure("ours", replace(s, count=800), folder, 1, 5.0)
    assert 0 < found["first_batch"] < 5
    assert min(found["per_second"], found["per_cpu_second"]) > 0
    assert script.limit(s, 2, 2.0)["per_cpu_second"] > 0


def runs(*values: float, cpus: float = 2.0) -> list[dict]:
    return [{"per_second": v, "per_cpu_second": v / cpus, "first_batch": 0.1} for v in values]


def test_ratios_are_of_the_best_of_each_round(script):
    results = {
        ("ours", 0): runs(10, 20, 30), ("ours", 2): runs(20, 10, 60),
        ("webdataset", 0): runs(1, 5, 2, cpus=1), ("webdataset", 2): runs(2, 4, 3), ("limit", 1): runs(40, 40, 60),
    }  # fmt: skip
    per_second, per_cpu_second, thriftiest = script.RATIOS.values()
    assert script.ratios(results, "webdataset", *per_second) == [10, 4, 20]
    assert script.ratios(results, "webdataset", *per_cpu_second) == [10, 2, 20]
    assert script.ratios(results, "webdataset", *thriftiest) == [10, 2, 15]
    assert script.ratios(results, "limit", *per_cpu_second) == [0.5, 0.5, 1]
    shown = script.table(script.SETS["jpeg"], results | {("limit", 2): runs(50, 50, 50)}).splitlines()
    assert shown[2] == "| ours | 0 | 10 (8 to 12) | 20 (15 to 25) | 0.10 |"
    assert "| webdataset | 10.00 (7.00 to 15.00) | 10.00 (6.00 to 15.00) | 10.00 (6.00 to 12.50) | 2.5 |" in shown


def test_what_fails_is_left_out_with_a_word(script, tmp_path, capsys):
    assert (
        script.alone(what="measure", name="ours", set_name="jpeg", folder=str(tmp_path), workers=0, seconds=1) is None
    )
    assert "left out" in capsys.readouterr().err


def test_a_call_answers_in_json(script, capsys):
    call = {"what": "limit", "set_name": "jpeg", "processes": 1, "seconds": 2.0}
    assert script.main(["--call", json.dumps(call)]) == 0
    assert json.loads(capsys.readouterr().out)["per_second"] > 0
