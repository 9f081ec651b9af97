"""A run whose data end with an error has saved all that it could learn before."""

from itertools import islice

import pytest
import torch
from saved_runs import named, names, overrides, run, shards, tensors  # noqa: F401 (fixtures)

from diffusion_trainer.conventions import PassingError
from diffusion_trainer.streaming.data import ShardData

pytestmark = pytest.mark.filterwarnings("ignore")
ERROR = {"error": "the store does not answer", "passing": True, "damage": []}


class Ill:
    """A loader that gives so many batches, and an error in place of the next."""

    def __init__(self, loader, good: int):
        self.loader, self.good = loader, good

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        yield from islice(self.loader, self.good)
        yield ERROR


@pytest.mark.parametrize(("micro_batches", "good"), [(1, 1), (1, 3), (2, 4), (2, 5), (4, 11)])
def test_it_goes_on_from_the_last_whole_step(run, tmp_path, monkeypatch, capsys, micro_batches, good):
    more = ["callbacks.checkpoint.every_n_images=1000", f"trainer.accumulate_grad_batches={micro_batches}"]
    with monkeypatch.context() as patch:
        loader = ShardData.loader
        patch.setattr(ShardData, "loader", lambda *arguments: Ill(loader(*arguments), good))
        with pytest.raises(PassingError, match="the store does not answer"):
            run(160, *more)
    steps = good // micro_batches
    assert names(tmp_path / "run") == [*named(32 * steps), "latest"]
    assert f"the data go no further than {32 * steps} images" in capsys.readouterr().out
    assert run(160, *more) == 0
    assert run(160, *more, folder=tmp_path / "whole") == 0
    ours, whole = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("micro_batches", "good"), [(1, 0), (4, 3)])
def test_before_the_first_step_there_is_nothing_to_save(run, tmp_path, monkeypatch, micro_batches, good):
    loader = ShardData.loader
    monkeypatch.setattr(ShardData, "loader", lambda *arguments: Ill(loader(*arguments), good))
    with pytest.raises(PassingError, match="the store does not answer"):
        run(160, f"trainer.accumulate_grad_batches={micro_batches}")
    assert not (tmp_path / "run" / "checkpoints").is_dir() or not names(tmp_path / "run")
