"""What guidance by gradients reads: networks, pictures and arrays, and what conf/guidance makes of them."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import yaml
from exact import MIXTURE
from options import names
from PIL import Image as Picture
from sampling.classifiers import CONDITION, EXACT, NOISY, Image, KnowsNoise, Marginal, Net, noisy, scripting
from torch import Tensor, nn
from torch.testing import assert_close

from diffusion_trainer.apps.config import CONF
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.conventions import UserError
from diffusion_trainer.sampling.gradient_guidance import (
    ClassifierGuidance,
    CleanClassifierGuidance,
    SimilarityGuidance,
)
from diffusion_trainer.sampling.guidance import AutoGuidance, Interval, Nested, WeakModel
from diffusion_trainer.sampling.torchscript import read_reference


@pytest.fixture
def scripted(tmp_path):
    return scripting(tmp_path)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3)])
def test_a_picture_is_shown_in_the_range_and_channels_of_the_images(tmp_path, mode, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    Picture.fromarray(pixels).convert(mode).save(tmp_path / "y.png")
    shown = read_reference(str(tmp_path / "y.png"), channels)
    assert shown.shape == (1, channels, 4, 6)
    assert (shown[0, :, 0, 0].tolist(), shown[0, :, 0, 1].tolist()) == ([-1] * channels, [1] * channels)
    if channels == 3:
        assert_close(shown[0], torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)


def test_an_array_is_shown_as_it_is(tmp_path):
    np.save(tmp_path / "y.npy", np.arange(6))
    assert torch.equal(read_reference(str(tmp_path / "y.npy"), 3), torch.arange(6)[None])


def test_similarity_to_a_picture_grows(scripted, tmp_path):
    Picture.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8)).save(tmp_path / "y.png")
    encoder = scripted(Net(16, 5).float())
    guidance = SimilarityGuidance(0.5, encoder, encoder, str(tmp_path / "y.png"))
    x_t = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def similarity(denoiser):
        x_0_hat = denoiser(x_t, NOISY, None).x_0_hat
        return guidance.log_potential(x_t, x_0_hat, NOISY, None)

    assert (similarity(guidance(Image())) > similarity(Image())).all()


class BadShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


def test_what_cannot_be_used_is_said_when_it_is_used(scripted, tmp_path):
    x_t, text = noisy(), tmp_path / "text.pt"
    text.write_text("no network")
    good, noisy_one, other = scripted(Net(2, 2)), scripted(KnowsNoise(2, 2)), scripted(Net(2, 5))
    np.save(tmp_path / "y.npy", np.zeros(2))
    np.save(tmp_path / "long.npy", np.zeros(3))
    y, absent = str(tmp_path / "y.npy"), str(tmp_path / "absent.pt")
    cases = [
        (ClassifierGuidance(1.0, absent), CONDITION, "absent.pt: there is no such file.*x_t.*log_snr.*logits"),
        (CleanClassifierGuidance(1.0, absent), CONDITION, r"absent.pt: there is no such file.*images.*logits"),
        (CleanClassifierGuidance(1.0, str(text)), CONDITION, "text.pt is not a TorchScript file.*classifier"),
        (CleanClassifierGuidance(1.0, noisy_one), CONDITION, "takes 2 inputs, not 1; it should be a classifier"),
        (ClassifierGuidance(1.0, good), CONDITION, "takes 1 inputs, not 2; it should be a classifier of noisy"),
        (CleanClassifierGuidance(1.0, scripted(Net(3, 2))), CONDITION, r"does not take \(40, 2\) \(.*shapes"),
        (CleanClassifierGuidance(1.0, scripted(BadShape())), CONDITION, r"returns \(40,\).*\(40, K\)"),
        (CleanClassifierGuidance(1.0, good), None, "needs a label.*no condition"),
        (CleanClassifierGuidance(1.0, good), x_t, r"needs labels \(B,\) int64.*\(40, 2\)"),
        (SimilarityGuidance(1.0, good, good, absent), None, "absent.pt cannot be read.*picture or an array"),
        (SimilarityGuidance(1.0, good, good, str(text)), None, "text.pt cannot be read"),
        (SimilarityGuidance(1.0, absent, good, y), None, "absent.pt: there is no such file.*encoder: images"),
        (SimilarityGuidance(1.0, good, absent, y), None, "absent.pt: there is no such file.*encoder: reference"),
        (SimilarityGuidance(1.0, good, other, y), None, "do not belong together.*2 and 5"),
        (SimilarityGuidance(1.0, good, good, str(tmp_path / "long.npy")), None, r"does not take \(1, 3\)"),
    ]
    for guidance, condition, message in cases:
        denoiser = guidance(EXACT if condition is not x_t else Marginal(MIXTURE))
        with pytest.raises(UserError, match=message):
            denoiser(x_t, NOISY, condition)


def test_a_file_is_read_once_and_each_call_has_the_same_bits(scripted, tmp_path):
    path, x_t = scripted(Net(2, 2)), noisy()
    guidance = CleanClassifierGuidance(1.0, path)
    before = guidance(EXACT)(x_t, NOISY, CONDITION).x_0_hat
    (tmp_path / path).unlink()
    for _ in range(3):
        assert torch.equal(guidance(EXACT)(x_t, NOISY, CONDITION).x_0_hat, before)


@dataclass(frozen=True)
class Weak(WeakModel):
    def denoiser(self, device):
        return Image()


def node_of(name, files):
    """The yaml with its missing values filled in; a weak model needs a checkpoint, and has a test of its own."""
    node = yaml.safe_load((CONF / "guidance" / f"{name}.yaml").read_text())
    missing = {key: files[key] for key, value in node.items() if value == "???"}
    return {**node, **missing, **({"weak": Weak()} if "weak" in node else {})}


@pytest.mark.parametrize("name", names("guidance"))
def test_every_guidance_of_conf_keeps_null_and_shape(scripted, tmp_path, name):
    Picture.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "y.png")
    encoder, clean = scripted(Net(48, 5).float()), name == "clean_classifier"
    classifier = scripted((Net if clean else KnowsNoise)(48, 3).float())
    files = {"image_encoder": encoder, "reference_encoder": encoder, "reference": str(tmp_path / "y.png")}
    guidance = build(node_of(name, {**files, "classifier": classifier}), "guidance")
    guided, condition = guidance(Image()), torch.tensor([0, 1, 2])
    x_t = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_0_hat = guided(x_t, NOISY, condition).x_0_hat
    assert torch.equal(guided.null(condition), Image().null(condition))
    assert (x_0_hat.shape, x_0_hat.dtype) == (x_t.shape, x_t.dtype)
    assert x_0_hat.isfinite().all()
    once_more = Nested([guidance, Interval(guidance, -5.0, 5.0)])(Image())(x_t, NOISY, condition).x_0_hat
    assert once_more.shape == x_t.shape


def test_autoguidance_of_conf_is_built_from_the_scale_and_a_weak_model():
    guidance = build(node_of("autoguidance", {}), "guidance")
    assert guidance == AutoGuidance(2.0, Weak())
    assert replace(guidance, scale=1.0)(EXACT) is EXACT
