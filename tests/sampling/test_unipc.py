"""UniPC: its predictor and corrector by the paper's linear system, and the order that the corrector adds."""

from itertools import pairwise
from math import expm1

import pytest
import torch
from cases import each
from configured import SCHEDULES, every_schedule
from solving import Noise, errors_of, slope
from test_dpm_solver import TIMES, Recorded, path
from torch.testing import assert_close

from diffusion_trainer.process.levels import levels
from diffusion_trainer.process.schedules import RectifiedFlow
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.grids import UniformLogSNR
from diffusion_trainer.sampling.sampler import Sampler
from diffusion_trainer.sampling.unipc import UniPC

every_order = each("p", [2, 3])
LONGER = (0.9, *TIMES, 0.2)


def solved(h, r):
    """a of R_p(h) a B(h) = phi_p(h), on x_0_hat: hh = -h and B = e^hh - 1 (Zhao et al. 2023, eq. 7 and appendix)."""
    hh, b, factorial = -h, [], 1.0
    phi = expm1(hh) / hh - 1
    for i in range(1, len(r) + 1):
        b.append(phi * factorial / expm1(hh))
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    r = torch.tensor(r, dtype=torch.float64)
    return torch.linalg.solve(torch.stack([r**k for k in range(len(r))]), torch.tensor(b, dtype=torch.float64)).tolist()


def uni(t, s, x, at, estimates, a):
    """UniP or UniC: from x at t to s; further levels, their estimates less that at t over r, and their a."""
    h = s.half_log_snr - t.half_log_snr
    out = s.sigma / t.sigma * x - s.alpha * expm1(-h) * estimates[t]
    for level, weight in zip(at, a, strict=True):
        r = (level.half_log_snr - t.half_log_snr) / h
        out = out - s.alpha * expm1(-h) * weight * (estimates[level] - estimates[t]) / r
    return out


def ratios(t, s, at):
    return [(u.half_log_snr - t.half_log_snr) / (s.half_log_snr - t.half_log_snr) for u in at]


def written_out(schedule, p, x, estimates):
    """Algorithms 5 and 6, evaluations reused: x at the last of LONGER."""
    at, previous = levels(schedule, LONGER), []
    known = dict(zip(at, estimates, strict=False))
    for i, (t, s) in enumerate(pairwise(at)):
        if i > 0:  # correct the step that led here
            before, start = at[i - 1], previous
            earlier = at[max(0, i - p) : i - 1]
            nodes, h = [*earlier, t], t.half_log_snr - before.half_log_snr
            a = solved(h, ratios(before, t, nodes)) if len(nodes) > 1 else [0.5]
            x = uni(before, t, start, nodes, known, a)
        earlier = at[max(0, i + 1 - p) : i]
        h = s.half_log_snr - t.half_log_snr
        a = solved(h, ratios(t, s, earlier)) if len(earlier) > 1 else [0.5] * len(earlier)
        previous, x = x, uni(t, s, x, earlier, known, a)
    return x


@every_schedule
@every_order
def test_steps_are_those_of_the_paper(p, schedule):
    seen, x = Recorded(), Noise(4)()
    xs = path(UniPC(p), schedule, x, seen, times=LONGER)
    assert seen.levels == levels(schedule, LONGER)[:-1]  # one call a step
    assert_close(xs[-1], written_out(schedule, p, x, seen.estimates), rtol=1e-8, atol=1e-8)


@every_schedule
def test_order_with_three_estimates_is_four(schedule):
    # Finer steps than those of the generic theorem: before, the errors of two orders cancel here and there.
    steps = (128, 256)
    sampler = Sampler(UniPC(predictor_order=3), UniformLogSNR(), 20)
    assert slope(steps, errors_of(sampler, schedule, steps)) > 3.6
    assert sampler.solver.order == 4


@every_order
def test_from_no_signal_later_steps_do_not_look_back_to_it(p):
    schedule, times = RectifiedFlow(t_max=1.0), (1.0, 0.8, 0.6, 0.5, 0.4)
    xs = path(UniPC(p), schedule, Noise(4)(), lambda x, level: 0.3 * x, times=times)
    assert all(x.isfinite().all() and x.abs().max() < 5 for x in xs)
    weights = [w for plan in UniPC(p).plan(schedule, torch.tensor(times), FixedSmall()) for w in plan.predict.weights]
    assert all(abs(w) < 5 for w in weights)


@every_order
def test_history_is_the_order_of_the_predictor(p):
    with pytest.raises(ValueError, match=f"combine {p} estimates: use at least {p + 1}"):
        Sampler(UniPC(p), UniformLogSNR(), p)


@pytest.mark.parametrize("wrong", [0, 1, 4])
def test_other_orders_are_refused(wrong):
    with pytest.raises(ValueError, match="predictor_order must be 2 or 3"):
        UniPC(wrong)


@every_order
def test_state_holds_no_more_estimates_than_steps_combine(p):
    x, state = Noise(4)(), UniPC(p).init()
    for plan in UniPC(p).plan(SCHEDULES["linear"], torch.tensor(LONGER, dtype=torch.float64), FixedSmall()):
        x, state = UniPC(p).step(lambda x, level: Estimate(0.3 * x), x, plan, state, None)
    assert len(state[1]) == p
