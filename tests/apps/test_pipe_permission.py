"""A run's folder may come from somebody else: opening it runs no shell command that its configuration names."""

import pytest
import tiny
from written_runs import config_of, write_run

from diffusion_trainer.apps import cli, evaluate, finished, likelihood, sample, variance
from diffusion_trainer.conventions import UserError

ALLOW = "data.store.allow_pipe=true"


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The run runs/theirs, whose shards are the output of a command that makes this file; it says allow_pipe."""
    shards, marker = tiny.overrides(tmp_path), tmp_path / "ran"
    store = f"{{_target_: diffusion_trainer.streaming.cached.CachedStore, cache: '{tmp_path}/cache', allow_pipe: true, "
    store += f"cache_bytes: 100000000, index: '{tmp_path}/tiny'}}"
    config = config_of(shards, f"data.store={store}")
    config["data"]["shards"] = f"pipe:touch {marker}; cat {tmp_path}/tiny/train-000000.tar"
    write_run(tmp_path / "runs" / "theirs", config)
    monkeypatch.chdir(tmp_path)
    return marker


def measured(*more: str) -> int:
    few = ["num_samples=4", "num_levels=2", "batch_size=4", "accelerator=cpu"]
    return cli.run(["variance", "checkpoint=runs/theirs", *few, *more])


def test_a_command_that_a_runs_folder_allows_itself_is_run_only_for_who_allows_it_too(marker):
    with pytest.raises(UserError, match=f"runs a shell command; set {ALLOW} to have that"):
        measured()
    assert not marker.exists()
    assert measured(ALLOW) == 0
    assert marker.exists()


def test_no_verb_takes_the_permission_over(marker):
    for verb in (sample, evaluate, likelihood, variance):
        assert "allow_pipe: false" in verb.show(["checkpoint=runs/theirs"])
        assert "allow_pipe: true" in verb.show(["checkpoint=runs/theirs", ALLOW])


def test_it_is_found_wherever_it_stands():
    theirs = {"a": [{"allow_pipe": True, "b": 1}], "allow_pipe": True, "c": {"store": {"allow_pipe": True}}}
    assert finished._tamed(theirs) == {
        "a": [{"allow_pipe": False, "b": 1}], "allow_pipe": False, "c": {"store": {"allow_pipe": False}}
    }  # fmt: skip
