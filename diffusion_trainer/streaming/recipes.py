"""Sets of shards that take long to write: by several processes, on several machines, in several attempts.

Shard k depends on the recipe's settings and k alone, so that neither the number of processes nor an interruption shows
in its bytes. While a set is unfinished its shards lie in <folder>/.<name>.part, each with a note <shard>.json that is
written when it is whole. When all are there they appear in the folder, then their index, then <name>.json, which
says how the set was made.
"""

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.index import Shard, entry_of, shard_of
from diffusion_trainer.streaming.writer import beside, is_shard_of, publish, shard_name, staging, write_shard

SETTINGS = "settings.json"

Skip = Callable[[str], None]  # takes what is wrong with an item that is left out


class Recipe(ABC):
    """Frozen dataclasses: they travel to other processes."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """All that the shards depend on, as JSON has it; it stands in <name>.json."""

    @property
    @abstractmethod
    def num_shards(self) -> int: ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What <name>.json says besides, that is known only after the writing."""
        return {}

    @abstractmethod
    def samples(self, k: int, skip: Skip) -> Iterator[Mapping]:
        """Of shard k, as {"__key__": ..., extension: bytes}. Items that cannot be used are told to `skip`."""


@dataclass(frozen=True)
class Written:
    """A shard that is whole, and what was left out of it."""

    shard: Shard
    skipped: Sequence[str]

    def save(self, path: Path) -> None:
        write_json(path, entry_of(self.shard) | {"skipped": self.skipped})

    @classmethod
    def load(cls, path: Path) -> "Written":
        entry = json.loads(path.read_text())
        return cls(shard_of(entry), entry["skipped"])


@dataclass(frozen=True)
class Job:
    """Writes shards of one set, wherever it is sent."""

    recipe: Recipe
    folder: Path
    name: str
    strict: bool = False  # an item that cannot be used stops it

    def __post_init__(self):
        if self.name in ("", "index") or "/" in self.name or self.name.startswith("."):
            raise UserError(f"--name {self.name!r} cannot be: it is the first part of file names, and not 'index'")

    @property
    def part(self) -> Path:
        return staging(self.folder, self.name)

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name}.json"

    def note(self, k: int) -> Path:
        return self.part / f"{shard_name(self.name, k)}.json"

    def write(self, k: int) -> Written:
        """Shard k. UserError where the disk refuses."""
        skipped: list[str] = []
        try:
            shard = write_shard(self.part / shard_name(self.name, k), self.recipe.samples(k, self._skip(skipped)))
            written = Written(shard, skipped)
            written.save(self.note(k))
        except OSError as error:
            raise UserError(f"{error}; the shards that are done stand: run the same command again") from error
        return written

    def _skip(self, skipped: list[str]) -> Skip:
        def skip(message: str) -> None:
            if self.strict:
                raise UserError(f"{message} (without --strict it would be left out)")
            skipped.append(message)

        return skip

    def begin(self) -> bool:
        """Makes the staging folder, or goes on in that of an interrupted attempt. False: the set is there already."""
        if self._finished():
            shutil.rmtree(self.part, ignore_errors=True)  # the last thing that may have been cut off
            return False
        unknown = sorted(file for file in self._there() if not (self.part / f"{file}.json").exists())
        if self._finished():  # by another rank, just now
            return False
        if unknown:
            raise UserError(f"{self.folder / unknown[0]} is not of this set; choose another --out or --name")
        self.part.mkdir(parents=True, exist_ok=True)
        self._check_same()
        return True

    def _there(self) -> set[str]:
        """Shards of that name in the folder."""
        files = os.listdir(self.folder) if self.folder.is_dir() else []
        return {file for file in files if is_shard_of(self.name, file)}

    def _check_same(self) -> None:
        path, settings = self.part / SETTINGS, self._settings()
        if not path.exists():
            write_json(path, settings)
        before = json.loads(path.read_text())
        if before != settings:
            raise UserError(
                f"{self.part} holds an unfinished set with other settings ({_differences(before, settings)}); finish "
                "it with those, remove it, or choose another --out or --name"
            )

    def _finished(self) -> bool:
        if not self.record.exists():
            return False
        before, settings = json.loads(self.record.read_text())["settings"], self._settings()
        if before != settings:
            raise UserError(
                f"{self.folder} has a set {self.name} with other settings ({_differences(before, settings)}); remove "
                "it, or choose another --out or --name"
            )
        missing = {shard_name(self.name, k) for k in range(self.recipe.num_shards)} - self._there()
        if missing:
            gone = self.folder / min(missing)
            raise UserError(f"{gone} is gone; remove {self.record} and the other shards to write the set anew")
        return True

    def _settings(self) -> dict:
        return json.loads(json.dumps(dict(self.recipe.settings)))

    def end(self) -> dict | None:
        """Publishes the set once all shards are there. What <name>.json says; None while other ranks are at work."""
        written = self._written()
        if written is not None and not self.record.exists():
            report = self._report(written)
            publish([w.shard for w in written], self.part, self.folder, self.name)
            write_json(self.record, report)
            shutil.rmtree(self.part, ignore_errors=True)
        return json.loads(self.record.read_text()) if self.record.exists() else None

    def _written(self) -> list[Written] | None:
        """All shards; None if one is missing, or if another rank has published them."""
        try:
            return [Written.load(self.note(k)) for k in range(self.recipe.num_shards)]
        except FileNotFoundError:
            return None

    def _report(self, written: Sequence[Written]) -> dict:
        skipped = [message for w in written for message in w.skipped]
        samples = sum(w.shard.samples for w in written)
        if not samples:
            shutil.rmtree(self.part, ignore_errors=True)
            raise UserError(f"nothing could be used: {'; '.join(skipped[:3])}")
        size = sum(w.shard.size for w in written)
        counts = {"shards": len(written), "samples": samples, "bytes": size, "skipped": skipped}
        return {"settings": self._settings(), **self.recipe.facts, **counts}


def _differences(before: Mapping, now: Mapping) -> str:
    keys = [key for key in (*before, *(k for k in now if k not in before)) if before.get(key) != now.get(key)]
    return ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys[:5])


def stamp(path: Path) -> tuple[int, int]:
    """Bytes of a file and when it was changed last (ns): another one where somebody mended it."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def fingerprint(listing: Iterable[tuple]) -> str:
    """Of what a set is made from, to stand in its settings."""
    return blake2b(repr(list(listing)).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def write_json(path: Path, value: Any) -> None:
    part = beside(path)
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
