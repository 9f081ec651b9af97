"""EMA profiles as functions of images seen, averages equal to their closed form, and steps that are not taken."""

import numpy as np
import pytest
import torch
from cases import each
from options import built

from diffusion_trainer.training.ema import (
    KEY,
    ConstantDecay,
    HalfLife,
    PowerFunction,
    Several,
    WarmUp,
    attach_ema,
    gamma_of,
    key_of,
)
from diffusion_trainer.training.nonfinite import NonFinite, spoiled
from diffusion_trainer.training.optimizers import AdamW, Constant


def kept(profile, steps: int, batch: int, first: int = 0) -> np.ndarray:
    """(steps + 1,) the share in the average of the initial weights and of those after each step."""
    shares = np.array([1.0])
    for n in range(steps):
        decay = profile.decay(first + n * batch, batch)
        shares = np.append(shares * decay, 1 - decay)
    return shares


def test_weights_of_a_half_life_ago_count_half():
    profile = HalfLife(half_life_images=1000, ramp_up_ratio=1e9)
    assert kept(profile, 10, 100)[0] == pytest.approx(0.5)
    early = HalfLife(half_life_images=1000, ramp_up_ratio=0.1)
    assert early.decay(0, 100) == pytest.approx(0.5 ** (100 / 10))
    assert early.decay(10**9, 100) == pytest.approx(0.5 ** (100 / 1000))


@pytest.mark.parametrize("relative_std", [0.05, 0.1, 0.2, 0.28])
def test_a_power_functions_shares_have_its_standard_deviation_and_its_shape(relative_std):
    steps = 20_000
    shares = kept(PowerFunction(relative_std), steps, 7)
    t = np.arange(steps + 1) / steps
    mean = (shares * t).sum()
    assert shares.sum() == pytest.approx(1)
    assert np.sqrt((shares * (t - mean) ** 2).sum()) == pytest.approx(relative_std, rel=1e-3)
    gamma = gamma_of(relative_std)
    assert shares[steps // 2] / shares[-1] == pytest.approx(0.5**gamma, rel=1e-2)
    assert shares[0] == 0  # nothing is left of the initial weights


def test_exponents_are_those_of_the_paper():
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)  # Karras et al. 2024, section 3.1
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)


def test_a_warm_up_ends_at_its_rate():
    profile = WarmUp(0.999)
    assert profile.decay(0, 32) == pytest.approx(2 / 11)
    assert profile.decay(32 * 89, 32) == pytest.approx(91 / 100)
    assert profile.decay(10**9, 32) == 0.999


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerFunction(0.3), r"relative_std must lie in \(0, 0.2887\)"),
        (lambda: PowerFunction(0.0), "relative_std"),
        (lambda: WarmUp(1.0), "rate must lie in"),
        (lambda: Several({"a": ConstantDecay(0.5)}, "b"), "main=b is none of the profiles a"),
        (lambda: Several({"a/b": ConstantDecay(0.5)}, "a/b"), "'a/b'"),
    ],
)
def test_profiles_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@each("ema", built("ema"))
def test_every_choice_has_a_main_average_with_decays_from_0_to_1(ema):
    assert KEY in ema.tracks
    for profile in ema.tracks.values():
        assert all(0 <= profile.decay(n, 128) < 1 for n in (0, 128, 10**6, 10**9))


def losing(model: torch.nn.Module, x: torch.Tensor) -> None:
    model.zero_grad()
    model(x).square().sum().backward()


PROFILES = {"a": ConstantDecay(0.8), "b": PowerFunction(0.1), "c": HalfLife(3, 0.5), "d": WarmUp(0.3)}
TRACKS = Several(PROFILES, "a").tracks


def test_averages_are_their_closed_forms_from_the_initial_weights_on():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    seen = [0]
    attach_ema(optimizer, {k: lambda t=t: t.decay(seen[0], 1) for k, t in TRACKS.items()}, NonFinite(optimizer))
    history = [model.weight.detach().clone()]
    for _ in range(6):
        losing(model, torch.randn(3, 4, dtype=torch.float64))
        optimizer.step()
        seen[0] += 1
        history.append(model.weight.detach().clone())
    assert TRACKS.keys() == {KEY, key_of("b"), key_of("c"), key_of("d")}
    for key, track in TRACKS.items():
        closed = sum(share * weight for share, weight in zip(kept(track, 6, 1), history, strict=True))
        assert torch.allclose(optimizer.state[model.weight][key], closed, rtol=1e-6)  # shares are float32


def stepped(model, optimizer, batches, closure=False) -> dict:
    """All that the optimizer holds after the batches. closure: gradients come inside of step(), as Lightning's do."""
    for x in batches:
        if closure:
            optimizer.step(lambda x=x: losing(model, x))
        else:
            losing(model, x)
            optimizer.step()
    state = optimizer.state
    return {(n, k): v.clone() for n, p in model.named_parameters() for k, v in {**state[p], "weight": p.data}.items()}


def made():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
    optimizer = AdamW(0.1, Constant(), weight_decay=0.1).build(model)
    nonfinite = NonFinite(optimizer)
    attach_ema(optimizer, {KEY: lambda: 0.9, key_of("b"): lambda: 0.5}, nonfinite)
    return model, optimizer, nonfinite


@pytest.mark.parametrize(("largest", "finite"), [(1e20, False), (float("nan"), False), (1e15, True)])
def test_a_loss_that_is_not_finite_has_no_finite_gradient_and_another_is_what_it_was(largest, finite):
    """x^2 overflows at 1e20, 2x does not."""
    x = torch.tensor([largest, 1.0, 0.1], requires_grad=True)
    loss = x.square().sum()
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (gradient,) = torch.autograd.grad(spoiled(loss), x)
    assert bool(loss.isfinite()) == finite
    assert torch.equal(gradient, plain) if finite else bool(gradient.isnan().all())
    assert torch.equal(spoiled(loss), loss) or not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("closure", [False, True])
def test_a_step_with_a_gradient_that_is_not_finite_is_as_if_it_had_never_been(bad, at, closure):
    """Weights, both averages, moments and the count of steps, to the last bit."""
    batches = list(torch.randn(4, 3, 4))
    model, optimizer, nonfinite = made()
    good = stepped(model, optimizer, batches, closure)
    assert float(nonfinite.kept) == 1
    spoiled = torch.full((3, 4), bad)
    model, optimizer, nonfinite = made()
    stepped(model, optimizer, [*batches[:at], spoiled], closure)
    assert float(nonfinite.kept) == 0
    again = stepped(model, optimizer, batches[at:], closure)
    assert again.keys() == good.keys()
    assert all(torch.equal(again[key], good[key]) for key in good)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize(("largest", "kept"), [(1e20, 0), (1e18, 1)])
def test_a_gradient_whose_square_float32_cannot_hold_is_not_finite_clipped_or_not(clip_norm, largest, kept):
    """Its second moment would be infinite, and it would be clipped to zero."""
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(0.1, Constant()).build(model)
    nonfinite = NonFinite(optimizer, clip_norm)
    before = model.weight.detach().clone()
    losing(model, torch.ones(1, 3))
    model.weight.grad[0, 0] = largest
    optimizer.step()
    assert float(nonfinite.kept) == kept
    assert torch.equal(model.weight, before) != bool(kept)
    if kept:
        assert float(optimizer.state[model.weight]["exp_avg"].norm()) == pytest.approx(
            0.1 * (clip_norm or largest), rel=1e-4
        )


def test_a_parameter_without_a_gradient_has_that_of_zero():
    """As under ZeRO; so there is an average of it, and all else that a checkpoint holds."""
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "spare": torch.nn.Linear(3, 2)})
    optimizer = AdamW(0.1, Constant()).build(model)
    attach_ema(optimizer, {KEY: lambda: 0.9}, NonFinite(optimizer))
    model["used"](torch.ones(1, 3)).sum().backward()
    spare = model["spare"].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model["spare"].weight, spare)
    assert {KEY, "exp_avg", "exp_avg_sq"} <= optimizer.state[model["spare"].weight].keys()
