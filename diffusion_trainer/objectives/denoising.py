"""The denoising objective: one formula for every schedule, prediction and weighting."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffusion_trainer.conventions import Draws, expand
from diffusion_trainer.objectives.base import LossTerms, Network, Objective
from diffusion_trainer.process.denoiser import split
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.predictions import Coefficients, Prediction
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.timesteps import Timesteps
from diffusion_trainer.process.variances import PosteriorVariance
from diffusion_trainer.process.weightings import Weighting


class Pass(NamedTuple):
    """One call of the network, and what it was about."""

    x_0: Tensor  # (B, ...)
    eps: Tensor  # (B, ...)
    x_t: Tensor  # (B, ...)
    level: Level  # of (B,)
    importance: Tensor  # (B,)
    weight: Tensor  # (B,), on the error of x_0
    coefficients: Coefficients
    output: Tensor  # (B, ...) F, float32
    second: Tensor | None  # (B, ...) the network's second output

    @property
    def x_0_hat(self) -> Tensor:
        c, x = self.coefficients, self.x_t
        return expand(c.skip, x) * x + expand(c.out, x) * self.output


@dataclass(frozen=True)
class Denoising(Objective):
    """w(t) |x_0_hat - x_0|^2 per dimension (Ho et al. 2020, eq. 12 and 14, in one space of weights).

    A learned schedule is trained to lower the variance of the loss, its mean being the same for any of them (Kingma et
    al. 2021, appendix I.2); so it goes only with weightings and timesteps of which that is true.
    """

    schedule: Schedule
    prediction: Prediction
    timesteps: Timesteps
    weighting: Weighting

    def __post_init__(self):
        self.prediction.check(self.schedule)
        if self.schedule.learned and not self.weighting.invariant:
            raise ValueError(
                f"a learned schedule would only make {type(self.weighting).__name__}'s loss small; it goes with "
                "weightings whose loss does not depend on the schedule: weighting=elbo_continuous or sigmoid"
            )
        if self.schedule.learned and not self.timesteps.unbiased:
            raise ValueError(
                f"a learned schedule would move noise levels to where {type(self.timesteps).__name__} seldom draws; it "
                "goes with timesteps that are uniform, or corrected to that: timesteps=stratified, uniform, "
                "loss_second_moment, or logit_normal with timesteps.corrected=true"
            )

    @property
    def second(self) -> type[PosteriorVariance] | None:
        return None

    @property
    def observes(self) -> bool:
        return self.timesteps.observes

    def observe(self, loss: Tensor, t: Tensor) -> None:
        self.timesteps.observe(self.schedule, loss, t)

    def state(self) -> dict:
        return self.timesteps.state()

    def load_state(self, state: dict) -> None:
        self.timesteps.load_state(state)

    def __call__(self, network: Network, x_0: Tensor, condition: Tensor | None, draws: Draws) -> LossTerms:
        return self.terms(self.run(network, x_0, condition, draws))

    def run(self, network: Network, x_0: Tensor, condition: Tensor | None, draws: Draws) -> Pass:
        """Draws t and the noise, and asks the network once."""
        t, importance = self.timesteps(self.schedule, draws)
        level = self.schedule.level(t)
        weight, c = self.weighting(self.schedule, level), self.prediction.coefficients(self.schedule, level)
        # A learned schedule is reached through these alone: `terms` hooks its gradient there.
        level, weight, c = Level(*map(_apart, level)), _apart(weight), Coefficients(*map(_apart, c))
        eps = draws.normal("eps", tuple(x_0.shape[1:]))
        x_t = expand(level.alpha, x_0) * x_0 + expand(level.sigma, x_0) * eps
        output, second = split(network(expand(c.into, x_t) * x_t, c.noise, condition).float(), x_t)
        return Pass(x_0, eps, x_t, level, importance, weight, c, output, second)

    def terms(self, p: Pass) -> LossTerms:
        c = p.coefficients
        error = (p.output - self.prediction.target(p.x_0, p.x_t, c)).square().flatten(1).mean(1)
        # |x_0_hat - x_0|^2 = out^2 |F - target|^2: the same number without dividing by a small alpha and back.
        loss = p.importance * p.weight * c.out**2 * error
        for number in (*p.level, p.weight, *c):
            if number.requires_grad:
                # The schedule lowers the mean of loss^2, whose gradient is 2 loss times that of the loss.
                number.register_hook(lambda gradient: 2 * loss.detach() * gradient)
        log_snr = 2 * (p.level.alpha / p.level.sigma).log()
        return LossTerms(loss, error, p.level.t, log_snr, p.importance)


class AroundDenoising(Objective):
    """Base of objectives that are made of a Denoising, `denoising`, and something of their own."""

    denoising: Denoising

    @property
    def schedule(self) -> Schedule:
        return self.denoising.schedule

    @property
    def prediction(self) -> Prediction:
        return self.denoising.prediction

    @property
    def observes(self) -> bool:
        return self.denoising.observes

    def observe(self, loss: Tensor, t: Tensor) -> None:
        self.denoising.observe(loss, t)

    def state(self) -> dict:
        return self.denoising.state()

    def load_state(self, state: dict) -> None:
        self.denoising.load_state(state)


def _apart(number: Tensor) -> Tensor:
    return number.clone() if number.requires_grad else number
