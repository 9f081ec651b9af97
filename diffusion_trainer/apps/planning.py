"""From swept overrides to checked points."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffusion_trainer.apps.config import assignment, expand
from diffusion_trainer.apps.places import PLACES, Point
from diffusion_trainer.conventions import UserError

Show = Callable[[Sequence[str]], str]  # from overrides to the YAML of the checked configuration
Check = Callable[[Sequence[str]], object]  # of overrides
Combination = tuple[Sequence[str], Sequence[str]]  # all overrides, and those of them that are swept


@dataclass(frozen=True)
class Planner:
    """show, check: the verb's own. `check` raises UserError for all that it can know to fail before it touches a
    device, so that no point fails for that after hours of others. beside: keys that say how a point is run, not what
    it is.
    """

    verb: str
    show: Show
    check: Check | None = None
    beside: Sequence[str] = ()

    def point(self, texts: Sequence[str], swept: Sequence[str]) -> Point:
        """UserError says what is wrong with it."""
        place = PLACES[self.verb](yaml.safe_load(self.show(texts)), swept)
        overrides = (*texts, *(assignment(key, text) for key, text in place.settings.items()))
        if self.check:
            self.check(overrides)
        return Point(tuple(swept), overrides, place, yaml.safe_load(self.show(overrides)))

    def points(self, combinations: Sequence[Combination]) -> list[Point]:
        """Each with a place of its own; UserError lists what is wrong with any of them, and with which."""
        points, wrong = [], {}
        for texts, swept in combinations:
            try:
                points.append(self.point(texts, swept))
            except UserError as error:
                wrong.setdefault(str(error), []).append(" ".join(swept))
        if wrong:
            raise UserError(_say(wrong, len(combinations)))
        _check_places(points)
        return points


def plan(verb: str, show: Show, overrides: Sequence[str], check: Check | None = None) -> list[Point]:
    """The points of all combinations of the swept values."""
    return Planner(verb, show, check).points(expand(overrides))


def home_of(points: Sequence[Point]) -> Path:
    """The sweep's folder: that of all its points, from here."""
    return Path(os.path.relpath(os.path.commonpath([point.place.home.absolute() for point in points])))


def _say(wrong: Mapping[str, Sequence[str]], count: int) -> str:
    """What is wrong with all of them is said once."""
    at = {error: "every point" if len(where) == count else "; ".join(where) for error, where in wrong.items()}
    return "nothing was started\n" + "\n".join(f"{where}:\n{error}" for error, where in at.items())


def _check_places(points: Sequence[Point]) -> None:
    owners: dict[Path, Point] = {}
    for point in points:
        other = owners.setdefault(point.place.out.absolute(), point)
        if other is not point:
            both = f"{other.title} and {point.title}"
            raise UserError(f"{both} would both write to {point.place.out}; leave the choice of the place to -m")
