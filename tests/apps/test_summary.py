"""What a run says at its end."""

import json

import pytest
import tiny
from written_runs import config_of, write_run

from diffusion_trainer.apps.train import summarize


@pytest.mark.parametrize("evaluated", [32, 64])
def test_an_evaluation_that_is_missing_is_said_with_the_command_that_makes_up_for_it(tmp_path, capsys, evaluated):
    """The very last one was stopped: the run is at its end, and the same command would not go on with anything."""
    config, run = config_of(tiny.overrides(tmp_path), f"folder='{tmp_path}/run'"), tmp_path / "run"
    run.mkdir()
    write_run(run, config, images=64)
    metrics = {"fid": 1.5}
    report = {"metrics": metrics, "images_seen": evaluated, "history": [{"images_seen": evaluated, **metrics}]}
    (run / "metrics.json").write_text(json.dumps(report))
    summarize(config, run)
    said = capsys.readouterr().out
    missing = f"FID 1.500 at 32 images; for the last: diffusion-trainer evaluate checkpoint={run}"
    assert (missing in said) == (evaluated == 32)
    assert "FID 1.500" in said
