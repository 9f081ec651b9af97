"""Second stage: a head that learns the variance of a trained model, whose mean stays as it is (Bao et al. 2022b).

Both heads estimate Var[eps | x_t], entry by entry; `variance=npr` and `variance=sn` sample with them.
"""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from diffusion_trainer.conventions import Draws, expand
from diffusion_trainer.objectives.base import LossTerms, Network
from diffusion_trainer.objectives.denoising import AroundDenoising, Denoising, Pass
from diffusion_trainer.process.variances import NoiseVariance, PosteriorVariance


@dataclass(frozen=True)
class _SecondStage(AroundDenoising):
    denoising: Denoising

    def __post_init__(self):
        if self.denoising.schedule.learned or self.denoising.timesteps.observes:
            raise ValueError(
                f"{type(self).__name__} trains a head alone: use the schedule as it is (no schedule=learned) and "
                "timesteps=uniform or stratified"
            )

    @property
    def second(self) -> type[PosteriorVariance]:
        return NoiseVariance

    def trains(self, parameter: str) -> bool:
        return parameter.startswith("network.second_head.")

    @abstractmethod
    def target(self, eps: Tensor, eps_hat: Tensor) -> Tensor:
        """Of which the head's output is to be the mean, given x_t; all (B, ...)."""

    def __call__(self, network: Network, x_0: Tensor, condition: Tensor | None, draws: Draws) -> LossTerms:
        p = self.denoising.run(network, x_0, condition, draws)
        error = (p.second - self.target(p.eps, eps_hat(p))).square().flatten(1).mean(1)
        terms = self.denoising.terms(p)
        return terms._replace(loss=p.importance * error, error=error)


def eps_hat(p: Pass) -> Tensor:
    """(B, ...), of the mean as it is: no gradient."""
    return (p.x_t - expand(p.level.alpha, p.x_t) * p.x_0_hat.detach()) / expand(p.level.sigma, p.x_t)


@dataclass(frozen=True)
class NPR(_SecondStage):
    """The noise prediction residual: E[(eps - eps_hat)^2 | x_t], optimal for a mean that is not (Bao et al. 2022b, eq.
    12 and theorem 3).
    """

    def target(self, eps: Tensor, eps_hat: Tensor) -> Tensor:
        return (eps - eps_hat) ** 2


@dataclass(frozen=True)
class SN(_SecondStage):
    """The squared noise: E[eps^2 | x_t] - eps_hat^2 (Bao et al. 2022b, eq. 10 and theorem 2).

    They regress eps^2 and take eps_hat^2, which is known given x_t, off afterwards; here it is off the target, so that
    both heads mean the same. The minimizer and the gradients are theirs.
    """

    def target(self, eps: Tensor, eps_hat: Tensor) -> Tensor:
        return eps**2 - eps_hat**2
