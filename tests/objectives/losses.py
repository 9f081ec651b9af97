"""What the tests of the denoising loss share: every prediction on every schedule that it serves, and the draws."""

import torch
from cases import each
from options import built

from diffusion_trainer.objectives.denoising import Denoising
from diffusion_trainer.process.predictions import Epsilon
from diffusion_trainer.process.timesteps import Stratified
from diffusion_trainer.process.weightings import Unit
from diffusion_trainer.training.randomness import LaneDraws

SCHEDULES = {name: schedule.frozen() for name, schedule in built("schedule").items()}
PREDICTIONS = built("prediction")
WEIGHTINGS = built("weighting")
COSINE = SCHEDULES["cosine"]
every_schedule = each("schedule", SCHEDULES)
every_prediction = each("prediction", PREDICTIONS)


def serves(prediction, schedule):
    try:
        prediction.check(schedule)
    except ValueError:
        return False
    return True


PAIRS = {
    f"{p}-{s}": (PREDICTIONS[p], SCHEDULES[s])
    for p in PREDICTIONS
    for s in SCHEDULES
    if serves(PREDICTIONS[p], SCHEDULES[s])
}
every_pair = each(("prediction", "schedule"), PAIRS)


def draws(count, first=0, batch_size=None):
    return LaneDraws(0, first, count, batch_size or count, 4, torch.device("cpu"))


def simple(schedule, weighting=None, prediction=None):
    return Denoising(schedule, prediction or Epsilon(), Stratified(), weighting or Unit())


def data_of(data, count):
    return data.sample(count, torch.Generator().manual_seed(1))[0].float()


class Seen:
    """What the objective draws, in float64: level of (B,), x_t and eps (B, 2), and the coefficients of a prediction."""

    def __init__(self, schedule, prediction, x_0, d):
        t, _ = Stratified()(schedule, d)
        self.level = schedule.level(t.double())
        self.eps = d.normal("eps", (2,)).double()
        self.x_t = self.level.alpha[:, None] * x_0 + self.level.sigma[:, None] * self.eps
        self.coefficients = prediction.coefficients(schedule, self.level)
        self.target = prediction.target(x_0.double(), self.x_t, self.coefficients)
