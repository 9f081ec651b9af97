"""Which points a sweep has: all combinations here, those that a search asks for in searching.py."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_trainer.apps.config import expand
from diffusion_trainer.apps.places import Point
from diffusion_trainer.apps.planning import Planner, home_of
from diffusion_trainer.apps.sweep_record import DONE, FAILED


class Course(ABC):
    """The points of one sweep, as they come."""

    home: Path  # the sweep's folder
    at_once: int  # points that may run at the same time
    count: int  # of all points, those that an earlier start has done included
    known: Sequence[Point] = ()  # before any of them has run
    study = ""  # what an earlier start has in common with this one, beyond the points that are known
    metric: str | None = None
    direction: str | None = None

    @abstractmethod
    def points(self) -> Iterator[Point]:
        """Each when it is its turn; some are done already."""

    def ended(self, point: Point, code: int, pruned: bool) -> str:
        """What became of the point, with an exit code; pruned: it was stopped because it was worse than others."""
        return FAILED if code else DONE

    def is_worse(self, point: Point) -> bool:
        """Whether a point that runs is not worth going on with."""
        return False


class Sweeper(ABC):
    """A choice of conf/sweeper."""

    @abstractmethod
    def course(self, planner: Planner, overrides: Sequence[str]) -> Course:
        """UserError for what can be known to be wrong with any of its points."""


class Listed(Course):
    def __init__(self, points: Sequence[Point]):
        self.known, self.home, self.count = points, home_of(points), len(points)
        self.at_once = len(points)

    def points(self) -> Iterator[Point]:
        return iter(self.known)


@dataclass(frozen=True)
class Grid(Sweeper):
    """Every combination of the values, the last key turning fastest."""

    def course(self, planner: Planner, overrides: Sequence[str]) -> Course:
        return Listed(planner.points(expand(overrides)))
