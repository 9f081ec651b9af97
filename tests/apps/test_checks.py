"""What cannot work is refused before weights are read, with what would."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from options import built
from written_runs import config_of, finished_runs

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps import sample, train
from diffusion_trainer.apps.checks import check_guidance, check_heartbeat, levels_of
from diffusion_trainer.apps.config import load
from diffusion_trainer.apps.parts import TrainConfig
from diffusion_trainer.conventions import UserError
from diffusion_trainer.process import analytic

pytestmark = pytest.mark.slow

SAMPLERS = built("sampler")
COSINE = built("schedule")["cosine"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny.overrides(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    return finished_runs(tmp_path_factory.mktemp("runs"), shards)


@pytest.fixture(autouse=True)
def in_the_folder(runs, monkeypatch):
    monkeypatch.chdir(runs)


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        console.run(list(arguments))
    return str(error.value)


def drawn(path) -> dict:
    return json.loads(str(np.load(f"{path}.npz")["provenance"]))


# ---- reverse variances of deterministic modes ------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["npr", "hybrid"])
@pytest.mark.parametrize("mode", ["interpolate", "reconstruct mode.steps=[3]", "invert"])
def test_a_deterministic_mode_leaves_the_runs_own_reverse_variance_aside(tmp_path, run, mode):
    given = yaml.safe_load(Path(f"runs/{run}/config.yaml").read_text())["variance"]["_target_"]
    assert not given.endswith("FixedSmall")
    for more in ([], ["variance=beta_tilde"]):
        out = tmp_path / f"out{len(more)}"
        chosen = [f"mode={mode.split()[0]}", *mode.split()[1:], *more]
        assert console.run(["sample", f"checkpoint=runs/{run}", "n=2", f"out='{out}'", *chosen]) == 0
        assert drawn(out)["variance"] == {"_target_": "diffusion_trainer.process.variances.FixedSmall"}
    first, second = (np.load(tmp_path / f"out{i}.npz")["images"] for i in (0, 1))
    assert (first == second).all()


@pytest.mark.parametrize("mode", ["interpolate", "reconstruct", "invert"])
@pytest.mark.parametrize("variance", ["variance=npr", "variance=beta", "variance.bound=2.0"])
def test_a_deterministic_mode_refuses_a_reverse_variance_that_is_asked_for(mode, variance):
    message = refused("sample", "checkpoint=runs/npr", f"mode={mode}", variance)
    assert f"{variance}: mode={mode} is a deterministic map between noise and images, which has no reverse" in message
    assert "leave it out" in message


def test_drawing_keeps_the_runs_own():
    config = yaml.safe_load(sample.show(["checkpoint=runs/npr"]))
    assert config["variance"]["_target_"].endswith("NoiseVariance")


@pytest.mark.parametrize("mode", ["reconstruct mode.steps=[3]", "invert"])
def test_the_map_of_the_model_itself_leaves_the_runs_own_guidance_aside(tmp_path, mode):
    assert "ClassifierFree" in Path("runs/npr/config.yaml").read_text()
    out = tmp_path / "out"
    assert console.run(["sample", "checkpoint=runs/npr", "n=2", f"out='{out}'", *f"mode={mode}".split()]) == 0
    assert drawn(out)["guidance"] == {"_target_": "diffusion_trainer.sampling.guidance.NoGuidance"}


@pytest.mark.parametrize("mode", ["reconstruct", "invert"])
@pytest.mark.parametrize("guidance", ["guidance=classifier_free", "guidance.scale=2.0"])
def test_the_map_of_the_model_itself_refuses_guidance_that_is_asked_for(mode, guidance):
    message = refused("sample", "checkpoint=runs/npr", f"mode={mode}", guidance)
    assert f"{guidance}: mode={mode} is the map of the model itself, in which guidance takes no part" in message
    assert "leave it out" in message


def test_a_guided_interpolation_keeps_the_runs_guidance():
    config = yaml.safe_load(sample.show(["checkpoint=runs/npr", "mode=interpolate", "guidance.scale=2.0"]))
    assert config["guidance"]["scale"] == 2.0


# ---- labels and batches ----------------------------------------------------------------------------------------------


def test_the_modes_get_label_and_batch_size(tmp_path):
    arguments = ["sample", "checkpoint=runs/plain", "mode=invert", "label=3", "batch_size=2", "n=3"]
    assert console.run([*arguments, f"out='{tmp_path}/x'"]) == 0
    images = np.load(tmp_path / "x.npz")["images"][:3, 0]
    assert (images[:, 3] == 220).all()  # the bright row of class 3
    assert "label 10 is out of range" in refused("sample", "checkpoint=runs/plain", "mode=invert", "label=10")


# ---- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_a_labelled_weak_model_of_an_unlabelled_run_is_refused_by_both_names(verb):
    guidance = ["guidance=autoguidance", "guidance.weak.checkpoint=runs/plain"]
    evaluation = ["evaluation=digits"] if verb == "evaluate" else []
    message = refused(verb, "checkpoint=runs/unlabelled", *guidance, *evaluation)
    assert message.startswith("guidance of runs/unlabelled: guidance.weak.checkpoint=runs/plain was trained with label")
    assert "conditioning=none" in message


def test_a_labelled_run_may_be_guided_by_an_unlabelled_one_but_not_by_one_of_other_labels(tmp_path):
    common = ["sample", "checkpoint=runs/plain", "n=2", "guidance=autoguidance"]
    assert console.run([*common, "guidance.weak.checkpoint=runs/unlabelled", f"out='{tmp_path}/x'"]) == 0
    assert "no label is 5 for it and 10 for the" in refused(*common, "guidance.weak.checkpoint=runs/few")


OF = "diffusion_trainer.sampling.guidance"
EMPTY = f"{{_target_: {OF}.Nested, parts: []}}"


@pytest.mark.parametrize(
    "guidance",
    [
        ["guidance=nested", "guidance.parts=[]"],
        ["guidance=nested", f"guidance.parts=[{EMPTY}]"],
        ["guidance=nested", f"guidance.parts=[{{_target_: {OF}.Interval, low: -3, high: 3, inner: {EMPTY}}}]"],
    ],
)
def test_guidance_of_no_parts_is_refused(guidance):
    assert "a list of parts is empty" in refused("sample", "checkpoint=runs/plain", *guidance)


INTERVAL = ["guidance=classifier_free_interval"]


@pytest.mark.parametrize(("low", "high"), [(20, 30), (-40, -30), (0.1, 0.2)])
def test_an_interval_without_a_level_of_the_sampler_is_refused_with_those_beside_it(shards, low, high):
    ends = COSINE.log_snr(torch.tensor(COSINE.t_range, dtype=torch.float64))
    grid = torch.linspace(*ends.tolist(), 24).tolist()[::-1]
    near = [f"{x:.2f}" for x in ([x for x in grid if x < low][-1:] + [x for x in grid if x > high][:1])]
    chosen = [*INTERVAL, "sampler=ddim_log_snr", "sampler.num_steps=24"]
    config = config_of(shards, *chosen, f"guidance.low={low}", f"guidance.high={high}")
    with pytest.raises(UserError, match=rf"low={low}.* high={high}.* nearest: {' and '.join(near)}\).* more steps"):
        check_guidance(config, (1, 8, 8))
    check_guidance(config_of(shards, *chosen), (1, 8, 8))


def test_one_that_only_a_step_looks_into_is_met(shards):
    """Midpoint's second evaluations lie between the levels of the grid."""
    levels = levels_of(SAMPLERS["midpoint"], COSINE)
    assert len(levels) == 2 * SAMPLERS["midpoint"].num_steps - 1
    grid = sorted(level.log_snr for level in SAMPLERS["midpoint"].plan(COSINE, built("variance")["beta_tilde"])[0])
    between = min(x for x in levels if min(abs(x - g) for g in grid) > 0.01)
    ends = [f"guidance.low={between - 0.005}", f"guidance.high={between + 0.005}"]
    check_guidance(config_of(shards, *INTERVAL, "sampler=midpoint", *ends), (1, 8, 8))


# ---- variance statistics ---------------------------------------------------------------------------------------------

VARIANCE = ["variance", "checkpoint=runs/plain", "num_samples=4", "num_levels=3"]
ANALYTIC = ["sampler=ancestral", "sampler.num_steps=3", "variance=analytic", "n=2"]


@pytest.fixture
def measured(runs, tmp_path):
    """measured(*overrides) -> the statistics of the plain run."""

    def measure(*more: str) -> str:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        assert console.run([*VARIANCE, *more, f"out='{out}'"]) == 0
        return str(out)

    return measure


def test_statistics_say_of_what_they_are(measured):
    about = analytic.read(measured("seed=5")).about
    assert about.items() >= {"x_0_bound": 1.0, "num_levels": 3, "num_samples": 4, "seed": 5}.items()
    assert analytic.read(measured("sampler.x_0_bound=null")).about["x_0_bound"] is None


@pytest.mark.parametrize(("theirs", "ours"), [("null", 1.0), ("2.0", 1.0), ("1.0", "null")])
def test_statistics_of_estimates_clipped_otherwise_are_refused_with_both_bounds(measured, tmp_path, theirs, ours):
    own = [f"variance.statistics='{measured(f'sampler.x_0_bound={theirs}')}'"]
    drawing = ["sample", "checkpoint=runs/plain", *ANALYTIC, *own, f"out='{tmp_path}/x'"]
    message = refused(*drawing, f"sampler.x_0_bound={ours}")
    assert f"clipped to x_0_bound={theirs}, and here they are clipped to x_0_bound={ours}" in message
    assert f"run `diffusion-trainer variance checkpoint=runs/plain sampler.x_0_bound={ours}`" in message
    assert console.run([*drawing, f"sampler.x_0_bound={theirs}"]) == 0
    likelihood = ["likelihood", "checkpoint=runs/plain", "n=2", "variance=analytic", *own, f"out='{tmp_path}/y'"]
    assert f"x_0_bound={ours}" in refused(*likelihood, f"likelihood.x_0_bound={ours}")
    few = ["likelihood.num_steps=3", f"likelihood.x_0_bound={theirs}"]
    assert console.run([*likelihood, *few]) == 0


def test_a_measurement_asks_for_no_statistics_itself(runs, tmp_path):
    """Not even for damaged ones that the run's configuration names: they are what it is to make."""
    config = runs / "runs" / "plain" / "config.yaml"
    own = yaml.safe_load(config.read_text())
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    analytic = {"_target_": "diffusion_trainer.process.analytic.Analytic", "statistics": f"{tmp_path}/bad.safetensors"}
    trajectory = "diffusion_trainer.sampling.optimal_trajectory.OptimalTrajectory"
    grid = {"_target_": trajectory, "statistics": f"{tmp_path}/bad.safetensors"}
    changed = {**own, "variance": analytic, "sampler": {**own["sampler"], "grid": grid}}
    text = config.read_text()
    config.write_text(yaml.safe_dump(changed))
    try:
        assert console.run([*VARIANCE, f"out='{tmp_path}/x.safetensors'"]) == 0
        assert "bad.safetensors cannot be read" in refused("sample", "checkpoint=runs/plain")
    finally:
        config.write_text(text)


# ---- what would be noticed only when it matters ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "processes", "is_refused"), [("ddp", 2, True), ("zero2", 8, True), ("ddp", 1, False)]
)
def test_a_hang_must_be_told_before_the_collectives_break(strategy, processes, is_refused):
    chosen = [f"strategy={strategy}", "strategy.timeout_seconds=300", "callbacks.heartbeat.hang_timeout_seconds=300"]
    config = load("train", ["experiment=digits", *chosen], TrainConfig)
    if is_refused:
        with pytest.raises(UserError, match="hang_timeout_seconds=300 must be less than "):
            check_heartbeat(config, processes)
    else:
        check_heartbeat(config, processes)
    remedy = load(
        "train", ["experiment=digits", *chosen[:2], "callbacks.heartbeat.hang_timeout_seconds=270"], TrainConfig
    )
    check_heartbeat(remedy, processes)


def test_a_run_of_two_processes_is_not_begun_so(shards, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"hang_timeout_seconds=450 would do$"):
        train.check([*shards, "name=late", "strategy=ddp", "strategy.timeout_seconds=500"])
