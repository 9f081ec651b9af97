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

from diffusion_trainer.conventions import UserError, plain
from diffusion_trainer.streaming.index import Shard, entry_of, shard_of
from diffusion_trainer.streaming.locks import replace_file
from diffusion_trainer.streaming.writer import is_shard_of, publish, shard_name, staging, write_shard

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
    def load(cls, path: Path) -> "Written | None":
        """None if there is no such note, or none that can be read: then the shard has yet to be written."""
        try:
            entry = json.loads(path.read_bytes())
            return cls(shard_of(entry), entry["skipped"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None


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
            message = plain(message)  # strangers have named the samples
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
        before = read_json(path, dict, f"remove {self.part} to write the set anew")
        if before != settings:
            raise UserError(
                f"{self.part} holds an unfinished set with other settings ({_differences(before, settings)}); finish "
                "it with those, remove it, or choose another --out or --name"
            )

    def _finished(self) -> bool:
        if not self.record.exists():
            return False
        before, settings = self._recorded()["settings"], self._settings()
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

    def _recorded(self) -> dict:
        """What <name>.json says."""
        anew = "remove it and the shards of that name to write the set anew"
        record = read_json(self.record, dict, anew)
        if not isinstance(record.get("settings"), dict):
            raise UserError(f"{self.record} does not say how a set was made; {anew}")
        return record

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
        return self._recorded() if self.record.exists() else None

    def _written(self) -> list[Written] | None:
        """All shards; None if one is missing, or if another rank has published them."""
        written = [Written.load(self.note(k)) for k in range(self.recipe.num_shards)]
        return None if None in written else written

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
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path, kind: type, mend: str) -> Any:
    """UserError, with what would mend it, if it is no JSON of that kind."""
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, kind):
            raise ValueError(f"it has a {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not what was written there ({error}); {mend}") from error
    return value
