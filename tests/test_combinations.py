"""Schedule x prediction x objective x weighting x timesteps x sampler x variance x guidance: every pair that makes
sense trains and samples, and every pair that does not is refused with a reason before anything starts."""

import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from apps.written_runs import write_run
from covering import covering_array
from options import built, names
from safetensors.torch import save_file

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps import initial
from diffusion_trainer.apps.parts import TrainConfig, check_network, check_sampling, generator_of
from diffusion_trainer.apps.rank import module_of, progress_of
from diffusion_trainer.conventions import UserError

GROUPS = ("schedule", "prediction", "objective", "weighting", "timesteps", "sampler", "variance", "guidance")
FACTORS = {group: names(group) for group in GROUPS}
ZERO_SNR = {"zero_terminal_snr"}
SECOND = {"learned": {"hybrid"}, "npr": {"npr", "sn"}, "sn": {"npr", "sn"}}  # variance -> objectives that serve it
USES_VARIANCE = {name for name, sampler in built("sampler").items() if sampler.solver.uses_variance}
SDES = {"euler_maruyama", "predictor_corrector_ve", "predictor_corrector_vp"}


def learned_variance_without_its_objective(r):
    """No objective that trains the second output goes with a learned schedule, or (but hybrid) with adaptive times."""
    adaptive = r.get("timesteps") == "loss_second_moment" and r.get("variance") != "learned"
    return r.get("variance") in SECOND and (r.get("schedule") == "learned" or adaptive)


# Words of the message, any of which will do -> whether a row, of which some groups may be open, is refused.
RULES = {
    ("alpha is 0 at",): lambda r: r.get("schedule") in ZERO_SNR and r.get("prediction") in {"epsilon", "score"},
    ("cannot serve",): lambda r: r.get("schedule") in ZERO_SNR and r.get("sampler") in SDES,
    ("learned schedule",): lambda r: (
        r.get("schedule") == "learned" and r.get("weighting", "sigmoid") not in {"elbo_continuous", "sigmoid"}
    ),
    ("learned schedule", "schedule=learned", "Hybrid"): lambda r: (
        r.get("schedule") == "learned" and r.get("objective") in {"hybrid", "npr", "sn", "uncertainty"}
    ),
    ("seldom draws", "learned schedule"): lambda r: (
        r.get("schedule") == "learned" and r.get("timesteps") in {"logit_normal", "log_normal_sigma"}
    ),
    ("evens out the losses",): lambda r: (
        r.get("objective") == "uncertainty" and r.get("timesteps") == "loss_second_moment"
    ),
    ("trains a head alone",): lambda r: (
        r.get("objective") in {"npr", "sn"} and r.get("timesteps") == "loss_second_moment"
    ),
    ("second output",): lambda r: (
        r.get("variance") in SECOND and "objective" in r and r["objective"] not in SECOND[r["variance"]]
    ),
    ("second output", "learned schedule", "trains a head alone"): learned_variance_without_its_objective,
    ("has no use for",): lambda r: (
        r.get("variance", "beta_tilde") != "beta_tilde" and "sampler" in r and r["sampler"] not in USES_VARIANCE
    ),
}


def allowed(row):
    return not any(rule(row) for rule in RULES.values())


@lru_cache(maxsize=1)
def rows():
    return covering_array(FACTORS, allowed)


PARTS = 8
SMALL = [
    "network.base_channels=8", "network.blocks_per_level=1", "network.head_channels=8", "network.groups=2",
    "network.attention_levels=[]", "batch_size=8", "lanes=4", "conditioning.dim=8", "evaluation=none", "logger=csv",
]  # fmt: skip


class NoisyClassifier(torch.nn.Module):
    """(x_t, log_snr) -> logits (B, 10)."""

    def forward(self, x_t: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        return x_t.flatten(1)[:, :10] * log_snr.sigmoid()[:, None]


class CleanClassifier(torch.nn.Module):
    """images -> features, logits (B, 10)."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1), images.flatten(1)[:, :10]


class Encoder(torch.nn.Module):
    """images -> embedding (B, 64)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


GUIDANCE_FILES = {
    "classifier": {"classifier": "noisy.pt"},
    "clean_classifier": {"classifier": "clean.pt"},
    "similarity": {"image_encoder": "encoder.pt", "reference_encoder": "encoder.pt", "reference": "picture.npy"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What some options read: variance statistics, a classifier, an encoder, a picture, another run."""
    folder = tmp_path_factory.mktemp("files")
    log_snr = torch.linspace(-14, 20, 100, dtype=torch.float64)
    error = (-log_snr).sigmoid()[:, None, None, None].expand(-1, 1, 8, 8) * 0.3
    save_file({"log_snr": log_snr, "error": error.contiguous()}, folder / "statistics", {"about": json.dumps({})})
    for name, network in (("noisy", NoisyClassifier()), ("clean", CleanClassifier()), ("encoder", Encoder())):
        torch.jit.save(torch.jit.script(network), str(folder / f"{name}.pt"))
    np.save(folder / "picture.npy", np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8))
    config = configuration.load("train", ["experiment=digits", *SMALL, "guidance=none"], TrainConfig)
    model, _ = write_run(folder / "run", config)
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "first.safetensors")
    return folder


def extras(row, files):
    more = []
    if row["variance"].startswith("analytic"):
        more.append(f"variance.statistics={files}/statistics")
    if row["sampler"] == "optimal_trajectory":
        more.append(f"sampler.grid.statistics={files}/statistics")
    more += [f"guidance.{key}={files}/{name}" for key, name in GUIDANCE_FILES.get(row["guidance"], {}).items()]
    if row["guidance"] == "autoguidance":
        more.append(f"guidance.weak.checkpoint={files}/run")
    if row["objective"] in {"npr", "sn"}:
        more.append(f"init_from={files}/first.safetensors")
    if row["sampler"] != "dopri5":
        more.append("sampler.num_steps=5")  # pndm needs them
    return more


# Without an experiment, which Hydra would compose once more.
DIGITS = ["data=digits", "data.shards=x.tar", "network=unet_small"]


def load(row, files, *more, base=("experiment=digits",)):
    choices = [f"{group}={option}" for group, option in row.items()]
    return configuration.load("train", [*base, *choices, *SMALL, *extras(row, files), *more], TrainConfig)


BATCH = {
    "image": torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    "label": torch.arange(8),
    "first": 0,
}


def trained(config, folder, steps=2):
    """A module after some steps of one small batch, on the path of a run's rank."""
    module = module_of(config, progress_of(config), "cpu")
    if config["init_from"]:
        folder = folder / "second_stage"
        initial.write(folder, config["init_from"])
        initial.apply(module.model, initial.read(folder), config["init_from"])
    optimizer = module.configure_optimizers()
    for step in range(steps):
        optimizer.zero_grad()
        loss = module.training_step({**BATCH, "first": step * 8}, 0)
        assert loss.isfinite()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
        optimizer.step()
        module.images_seen += 8
    return module


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_sensible_pair_trains_and_samples(part, files, tmp_path, subtests):
    """Second stages from the weights of a first, autoguidance by another run."""
    for row in rows()[part::PARTS]:
        with subtests.test(msg=" ".join(f"{group}={option}" for group, option in row.items())):
            config = load(row, files)
            check_sampling(config)
            check_network(config, (1, 8, 8))
            module = trained(config, tmp_path).eval()
            generator = generator_of(config, module.model, module.objective, torch.device("cpu"), 0)
            x_0 = generator.draw([0, 1], torch.tensor([3, 7]))
            assert x_0.shape == (2, 1, 8, 8)
            assert x_0.dtype == torch.float32


def refused_pairs():
    for reasons, rule in RULES.items():
        for f in FACTORS:
            for g in FACTORS:
                if f < g:
                    yield from ((reasons, {f: a, g: b}) for a in FACTORS[f] for b in FACTORS[g] if rule({f: a, g: b}))


DEFAULTS = {
    "schedule": "cosine", "prediction": "v", "objective": "simple", "weighting": "elbo_continuous",
    "timesteps": "stratified", "sampler": "ddim", "variance": "beta_tilde", "guidance": "none",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reasons", "pair"),
    list(refused_pairs()),
    ids=lambda v: "-".join(v.values()) if isinstance(v, dict) else "",
)
def test_every_other_pair_is_refused_with_its_reason(reasons, pair, files):
    with pytest.raises(UserError) as caught:
        check_sampling(load({**DEFAULTS, **pair}, files, base=DIGITS))
    assert any(words in str(caught.value) for words in reasons), str(caught.value)


@pytest.mark.slow
def test_pairs_are_covered():
    """The array is what it says: each allowed pair of options stands in some row, and no row is refused."""
    assert all(allowed(row) and set(row) == set(GROUPS) for row in rows())
    for f in FACTORS:
        for g in FACTORS:
            if f < g:
                seen = {(row[f], row[g]) for row in rows()}
                assert seen == {(a, b) for a in FACTORS[f] for b in FACTORS[g] if allowed({f: a, g: b})}
