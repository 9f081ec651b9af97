"""Any of ranks 1, 2, 4 x stages 0-3 loads what any other has saved, and goes on as any other does.

All 144 pairs for three starts of processes: each world trains and saves at its four stages, waits for the other worlds,
then goes from checkpoint to checkpoint, a step from each.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from elastic_worlds import KINDS, LAYOUTS, WORLDS
from safetensors import safe_open

pytestmark = pytest.mark.slow

START = "import sys; from pathlib import Path; from diffusion_trainer.apps.processes import spawn; " \
    "sys.exit(spawn(sys.argv[2:], int(sys.argv[1]), Path(sys.argv[3]) / sys.argv[1]))"  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """After all worlds have saved and loaded."""
    path = tmp_path_factory.mktemp("elastic")
    child = str(Path(__file__).with_name("elastic_worlds.py"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    worlds = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(ranks), child, str(path)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for ranks in WORLDS
    ]  # fmt: skip
    try:
        outputs = [world.communicate(timeout=900)[0] for world in worlds]
    finally:
        for world in worlds:
            world.kill()  # nothing, where it has ended
    assert [world.returncode for world in worlds] == [0] * len(worlds), "\n".join(outputs)
    return path


@pytest.fixture(scope="module")
def saved(folder):
    """What the ranks of each layout held as it saved, gathered."""
    return {layout: torch.load(folder / f"{layout}.pt", weights_only=True) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def found(folder):
    """By the layout that loaded, then by that of the checkpoint."""
    return {layout: torch.load(folder / f"found by {layout}.pt", weights_only=True) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_any_other_saved_is_loaded_to_the_last_bit(found, saved, layout):
    for source in LAYOUTS:
        for kind in KINDS:
            held, loaded = saved[source][kind], found[layout][source]["loaded"][kind]
            assert held.keys() == loaded.keys()
            assert all(torch.equal(held[name], loaded[name]) for name in held), (source, kind)


@pytest.mark.parametrize("source", LAYOUTS)
def test_from_one_checkpoint_all_layouts_take_the_same_step(found, saved, source):
    """To summation order; and it is a step, from a state with which no other layout's is confused."""
    one = found[LAYOUTS[0]][source]
    assert not any(torch.equal(one["after"]["weight"][n], t) for n, t in saved[source]["weight"].items())
    for layout in LAYOUTS:
        other = found[layout][source]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for kind in KINDS:
            for name, tensor in one["after"][kind].items():
                torch.testing.assert_close(other["after"][kind][name], tensor, rtol=1e-4, atol=1e-6)


def test_layouts_saved_different_weights_from_as_many_files(folder, saved):
    """The matrix tells something only if its checkpoints differ, in content and in how they are cut."""
    first = saved[LAYOUTS[0]]["weight"]
    for layout in LAYOUTS[1:]:
        assert not any(torch.equal(first[n], t) for n, t in saved[layout]["weight"].items())
    for layout in LAYOUTS:
        ranks, stage = int(layout[0]), int(layout[-1])
        files = sorted((folder / layout).glob("images-*/rank-*.safetensors"))
        assert len(files) == (ranks if stage else 1)
    cut = [safe_open(file, framework="pt").keys() for file in (folder / "4 x stage 3").glob("images-*/*.safetensors")]
    assert len({key for keys in cut for key in keys}) > len(KINDS) * len(first)
