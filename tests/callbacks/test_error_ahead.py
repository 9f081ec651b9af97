"""A run whose data end with an error has saved all that it could learn before."""

import csv
from pathlib import Path

import pytest
import torch
from saved_runs import failing, named, names, overrides, run, shards, tensors  # noqa: F401 (fixtures)

from diffusion_trainer.callbacks.damage import LIST
from diffusion_trainer.conventions import PassingError, UserError
from diffusion_trainer.streaming.damage import Found
from diffusion_trainer.streaming.data import ShardData

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SAVED = "callbacks.checkpoint.every_n_images=1000"  # only at the end, or before an error
DOWN = {"error": "the store does not answer", "passing": True, "damage": []}
HOPELESS = {
    "error": "64 samples in a row are damaged",
    "passing": False,
    "damage": [Found("checksum", "h.tar", i, "its bytes are not those that were indexed") for i in range(3)],
}


class Ill:
    """A loader that gives an error in place of the micro-batch `at`, and damage in each second step."""

    def __init__(self, loader, at: int, error: dict):
        self.loader, self.at, self.error = loader, at, error

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for item, batch in zip(self.loader.items, self.loader, strict=True):
            if item == self.at:
                yield dict(self.error)
                return
            step = item // self.loader.layout.micro_batches
            yield batch | {"damage": [Found("checksum", "x.tar", item, "flipped")] if step % 2 else []}


@pytest.fixture
def ill(monkeypatch):
    """ill(at, error): what the loaders of all later runs give."""
    loader = ShardData.loader

    def ill(at: int, error: dict | None = None) -> None:
        monkeypatch.setattr(ShardData, "loader", lambda *arguments: Ill(loader(*arguments), at, error))

    return ill


def damage(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    with (folder / "metrics.csv").open(newline="") as file:
        counts = [(row["images_seen"], row.get("data/damaged") or "") for row in csv.DictReader(file)]
    return (folder / LIST).read_text(), [row for row in counts if row[1]]


@pytest.mark.parametrize("error", [DOWN, HOPELESS], ids=["down", "hopeless"])
@pytest.mark.parametrize(("micro_batches", "at"), [(1, 1), (1, 3), (2, 4), (2, 5), (4, 11)])
def test_it_goes_on_from_the_last_whole_step(run, ill, tmp_path, capsys, micro_batches, at, error):
    """However often it starts with the error: nothing is trained, listed or counted twice."""
    more = [SAVED, f"trainer.accumulate_grad_batches={micro_batches}", "data.damage_budget=0.9"]
    steps = at // micro_batches
    ill(at, error)
    for _ in range(2):
        with pytest.raises(PassingError if error["passing"] else UserError, match=error["error"]):
            run(160, *more)
        assert names(tmp_path / "run") == [*named(32 * steps), "latest"]
    assert f"the data go no further than {32 * steps} images" in capsys.readouterr().out
    assert (tmp_path / "run" / LIST).is_file() == bool(error["damage"] or steps > 1)
    ill(-1)
    assert run(160, *more) == 0
    assert run(160, *more, folder=tmp_path / "whole") == 0
    ours, whole = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert damage(tmp_path / "run") == damage(tmp_path / "whole")


@pytest.mark.parametrize(("micro_batches", "at"), [(1, 0), (4, 3)])
def test_before_the_first_step_there_is_nothing_to_save(run, ill, tmp_path, micro_batches, at):
    ill(at, DOWN)
    with pytest.raises(PassingError, match="the store does not answer"):
        run(160, f"trainer.accumulate_grad_batches={micro_batches}")
    assert not (tmp_path / "run" / "checkpoints").is_dir() or not names(tmp_path / "run")


@pytest.mark.parametrize("times", [1, 2])
def test_a_save_that_fails_is_tried_once_more_and_then_both_are_told(run, ill, tmp_path, monkeypatch, times):
    failing(monkeypatch, 96, times)
    ill(3, DOWN)
    with pytest.raises(PassingError, match="the store does not answer") as error:
        run(160, SAVED)
    assert (names(tmp_path / "run") == [*named(96), "latest"]) == (times == 1)
    assert ("of 96 images, could not be written" in str(error.value)) == (times == 2)
