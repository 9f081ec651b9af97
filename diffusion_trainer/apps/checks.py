"""The checks that need data, files or several parts at work: whether a configuration can do what it says."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffusion_trainer.apps.nodes import build
from diffusion_trainer.apps.parts import Parts
from diffusion_trainer.callbacks.evaluating import Evaluating
from diffusion_trainer.callbacks.heartbeat import Heartbeat
from diffusion_trainer.callbacks.redaction import literal, unset
from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conditioning.unconditional import Unconditional
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.evaluation import Evaluation
from diffusion_trainer.evaluation.features import TorchScriptFeatures
from diffusion_trainer.process.denoiser import Denoiser
from diffusion_trainer.process.levels import Level
from diffusion_trainer.process.schedules import Schedule
from diffusion_trainer.process.variances import Estimate, FixedSmall
from diffusion_trainer.sampling.guidance import AutoGuidance, ClassifierFree, Guidance, Interval, Nested
from diffusion_trainer.sampling.sampler import Sampler
from diffusion_trainer.streaming.arrays import Label
from diffusion_trainer.streaming.base import Data
from diffusion_trainer.streaming.data import ShardData

FIRST_SAMPLES = 256  # of the data that are looked at before a run


def check_data(config: Mapping[str, Any], data: Data, name: str = "data") -> None:
    """The first samples decode, and have what the conditioning reads; UserError otherwise. name: of their node."""
    conditioning = Parts.of(config, device="meta").conditioning
    missing = [name for name in conditioning.fields if name not in data.entries]
    if missing:
        raise UserError(
            f"the conditioning reads {missing[0]}, but {name}.fields.{missing[0]} is null; name what holds it, or use "
            "conditioning=none"
        )
    conditioning.check(_without_strays(data))


def _without_strays(data: Data) -> dict[str, Any]:
    """The first samples but those whose label is damage, being out of range: unless they are more than one and the
    budget allows, or all, for then not they are wrong but num_classes.
    """
    limits = {name: f.num_classes for name, f in data.entries.items() if isinstance(f, Label) and f.num_classes}
    unlimited = {name: replace(data.entries[name], num_classes=None) for name in limits}
    batch = replace(data, fields={**data.fields, **unlimited}).first(FIRST_SAMPLES)
    stray = torch.zeros(len(batch["image"]), dtype=torch.bool)
    for name, num_classes in limits.items():
        stray |= batch[name] >= num_classes
    if not stray.any() or stray.all() or int(stray.sum()) > max(1, data.damage_budget * len(stray)):
        return batch
    return data.first(FIRST_SAMPLES)


def check_secrets(config: Mapping[str, Any]) -> None:
    """UserError where a secret stands in the configuration, which is written into files (the run's folder, Weights &
    Biases, a job's script), or where the variable that it names is not there.
    """
    for key, name in unset(config):
        raise UserError(f"export {name}=... first: {key} names it")
    where = list(literal(config))
    if where:
        raise UserError(
            f"{', '.join(where)}: a password, key or signature would be written into files. Put it into an environment "
            "variable whose name ends with _TOKEN, _KEY, _SECRET or _PASSWORD (at least 8 characters), and name that: "
            f"{where[0]}='${{oc.env:MY_TOKEN}}'"
        )


def check_heartbeat(config: Mapping[str, Any], processes: int) -> None:
    """UserError if a rank would lose its peers before it may say that it hangs: then only one stack would be known."""
    allowed = config["allowed_targets"]
    limit = build(config["strategy"], "strategy", allowed).timeout_seconds
    for name, part in build(config["callbacks"], "callbacks", allowed).items():
        if isinstance(part, Heartbeat) and processes > 1 and part.hang_timeout_seconds >= limit:
            raise UserError(
                f"callbacks.{name}.hang_timeout_seconds={part.hang_timeout_seconds:g} must be less than "
                f"strategy.timeout_seconds={limit} with {processes} processes: a hang would break a collective before "
                f"its stacks are written; callbacks.{name}.hang_timeout_seconds={0.9 * limit:g} would do"
            )


def check_pictures(config: Mapping[str, Any]) -> None:
    """UserError if the run is to draw pictures and has no condition to draw them by."""
    allowed = config["allowed_targets"]
    if any(isinstance(part, Evaluating) for part in build(config["callbacks"], "callbacks", allowed).values()):
        build(config["conditioning"], "conditioning", allowed).examples(1)


def check_evaluation(config: Mapping[str, Any], data: ShardData, evaluation: Evaluation) -> None:
    """The reference is like the data and the feature network takes it; UserError otherwise."""
    reference = evaluation.reference.numbered()
    if reference.image_shape != data.image_shape:
        raise UserError(f"evaluation.reference has images {reference.image_shape}, data has {data.image_shape}")
    check_data({**config, "data": config["evaluation"]["reference"]}, reference, "evaluation.reference")
    TorchScriptFeatures(evaluation.features, reference.image_shape, "cpu")


@dataclass(frozen=True)
class _Half(Denoiser):
    """Stands for a model of which only the shapes count; remembers the log-SNRs at which it was asked."""

    conditioning: Conditioning
    asked: list[float] = field(default_factory=list)

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor | None) -> Estimate:
        self.asked.append(level.log_snr)
        return Estimate(x_t / 2)

    def null(self, condition: Tensor | None) -> Tensor | None:
        return self.conditioning.null(condition)


def check_guidance(config: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
    """UserError if the guidance cannot work: a file that is missing or takes other images, a missing condition, a list
    of no parts, an interval that no level of the sampler lies in.

    It is asked for one estimate, on the CPU: what it loads is loaded.
    """
    allowed = config["allowed_targets"]
    guidance, conditioning = (build(config[g], g, allowed) for g in ("guidance", "conditioning"))
    schedule = build(config["objective"], "objective", allowed).schedule.frozen()
    inside = list(_inside(guidance))
    if any(isinstance(part, Nested) and not part.parts for part in inside):
        raise UserError("guidance: a list of parts is empty; put guidances into it, or use guidance=none")
    if intervals := [part for part in inside if isinstance(part, Interval)]:
        _check_intervals(intervals, levels_of(build(config["sampler"], "sampler", allowed), schedule))
    level, condition = schedule.level_at(sum(schedule.t_range) / 2), conditioning.stand_in(2)
    _check_null_class(config, [part for part in inside if isinstance(part, ClassifierFree)], condition)
    try:
        for part in inside:
            if isinstance(part, AutoGuidance) and part.scale != 1:
                _check_labels(conditioning, part.weak_denoiser(torch.device("cpu")), condition)
        guidance(_Half(conditioning))(torch.zeros(2, *image_shape), level, condition)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"guidance: {str(error).splitlines()[0]}") from error
    except UserError as error:
        raise UserError(f"guidance of {config.get('checkpoint') or config['name']}: {error}") from error


def _check_null_class(config: Mapping[str, Any], parts: Sequence[ClassifierFree], condition: Tensor | None) -> None:
    """That there is what they step away from: the model without a condition, which has to be trained."""
    if all(part.scale == 1 for part in parts):
        return
    if condition is None:
        raise UserError("guidance: the model has no condition, so nothing to guide it to: use guidance=none")
    if config.get("condition_dropout") == 0:
        raise UserError(
            "guidance: with condition_dropout=0 the model is never trained without its condition, from which "
            "classifier-free guidance steps away: use guidance=none, or train with condition_dropout=0.1"
        )


def _inside(guidance: Guidance) -> Iterator[Guidance]:
    """It, and all that are parts of it."""
    yield guidance
    for value in vars(guidance).values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Guidance):
                yield from _inside(part)


def _check_labels(conditioning: Conditioning, weak: Denoiser, condition: Tensor | None) -> None:
    """The null class is the one after the last: with another number of classes it would be one of them, or none."""
    ours, theirs = (None if condition is None else one.null(condition) for one in (conditioning, weak))
    if ours is not None and theirs is not None and not torch.equal(ours, theirs):
        raise UserError(
            f"guidance.weak: no label is {theirs[0].tolist()} for it and {ours[0].tolist()} for the one to be guided: "
            "their labels differ; it must be a model of the same labels, or of none"
        )


def _check_intervals(intervals: Sequence[Interval], asked: Sequence[float]) -> None:
    """asked: log-SNRs, ascending."""
    for part in intervals:
        if not any(part.low <= log_snr <= part.high for log_snr in asked):
            below, above = [x for x in asked if x < part.low], [x for x in asked if x > part.high]
            ends = " and ".join(f"{x:.2f}" for x in (*below[-1:], *above[:1]))
            raise UserError(
                f"guidance: the interval of log-SNR from low={part.low} to high={part.high} has none of the levels of "
                f"this sampler (the nearest: {ends}), so that it would guide nothing; widen it or take more steps"
            )


def levels_of(sampler: Sampler, schedule: Schedule) -> list[float]:
    """The log-SNRs, ascending, at which a run of the sampler asks for estimates; those within its steps, too."""
    spy, generator = _Half(Unconditional()), torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(1, 1, 2, 2, generator=generator)

    sampler(spy, schedule, FixedSmall(), noise(), None, noise)
    return sorted(set(spy.asked))
