"""A sweep finds what is wrong with any of its points before the first one starts."""

import importlib

import pytest
import tiny
from written_runs import finished_runs

from diffusion_trainer.apps import cli as console
from diffusion_trainer.apps.launchers import Local
from diffusion_trainer.conventions import UserError

pytestmark = pytest.mark.slow


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


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.setattr(Local, "start", lambda *_: pytest.fail("a point was started"))


@pytest.mark.usefixtures("nothing_starts")
def test_a_sweep_of_training_finds_all_contradictions_of_all_points_first(shards):
    network = [*(o for o in shards if not o.startswith("lanes")), *tiny.NETWORK, "strategy=single"]
    swept = ["sampler=ddim,heun", "variance=beta_tilde,beta", "lanes=4,3"]
    message = refused("train", "-m", *network, *swept)
    assert "nothing was started" in message
    assert "sampler=heun variance=beta lanes=4:\nsampler: Heun has no use for the reverse variance" in message
    assert message.count("lanes=3 must divide batch_size=32") == 1  # of four points
    assert "sampler=ddim variance=beta lanes=4" not in message
    message = refused("train", "-m", *network, "optimizer.lr=0.1,-1", "conditioning.num_classes=10,5")
    assert "label 5 is out of range: the model has 5 classes" in message
    assert "optimizer.lr=-1 conditioning.num_classes=5:\noptimizer: lr and eps must be positive" in message


@pytest.mark.usefixtures("nothing_starts")
def test_a_sweep_of_training_looks_at_the_folders_of_its_points(shards, runs):
    """A point's folder may hold another run."""
    (runs / "swept" / "seed-1").mkdir(parents=True, exist_ok=True)
    (runs / "swept" / "seed-1" / "thesis.tex").write_text("mine")
    arguments = [*shards, *tiny.NETWORK, "strategy=single", "folder=swept", "seed=0,1"]
    assert "seed=1:\nswept/seed-1 is not empty and holds no run" in refused("train", "-m", *arguments)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("verb", "swept", "say"),
    [
        ("sample", "sampler.solver.eta=0,2", "sampler.solver.eta=2:\nsampler.solver: eta must lie in [0, 1]"),
        ("sample", "label=3,10", "label=10:\nlabel 10 is out of range"),
        ("sample", "mode=draw,invert sampler=ancestral", "mode=invert:\nmode=invert needs a deterministic sampler"),
        ("sample", "guidance.weak.checkpoint=runs/plain,runs/no guidance=autoguidance", "runs/no: there is no chec"),
        ("sample", "network.base_channels=16,32", "network.base_channels=32:\ncheckpoint runs/plain/checkpoints"),
        ("likelihood", "likelihood.num_steps=3,1", "likelihood.num_steps=1:\nlikelihood: num_steps must be at least 2"),
        ("likelihood", "variance=beta,analytic", "variance=analytic:\nthis choice needs the variance statistics"),
        ("likelihood", "variance=beta,learned", "variance=learned:\nvariance: Learned reads a second output"),
        ("evaluate", "evaluation.seed=0,1 evaluation.features=a.pt", "every point:\nevaluation.features: a.pt is not"),
        ("evaluate", "evaluation.features=a.pt sampler=ddim,heun variance=beta", "sampler=heun:\nsampler: Heun has no"),
    ],
)
def test_sweeps_of_the_other_verbs_do_too(shards, verb, swept, say):
    (data,) = (o.split("=", 1)[1] for o in shards if o.startswith("data.shards="))
    reference = ["evaluation=digits", f"evaluation.reference.shards={data}"] if verb == "evaluate" else []
    assert say in refused(verb, "-m", "checkpoint=runs/plain", *reference, *swept.split())


@pytest.mark.parametrize("verb", ["sample", "evaluate", "likelihood", "variance"])
def test_what_main_refuses_check_refuses_alike(verb):
    """So that a sweep, which asks `check`, is not told less."""
    module = importlib.import_module(f"diffusion_trainer.apps.{verb}")
    messages = []
    for ask in (module.check, module.main):
        with pytest.raises(UserError) as error:
            ask(["checkpoint=runs/plain", "network.base_channels=32"])
        messages.append(str(error.value))
    assert messages[0] == messages[1]
