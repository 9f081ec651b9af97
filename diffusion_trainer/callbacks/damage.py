"""Damaged samples: counted, listed, and too many of them stop the run."""

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence

from diffusion_trainer.callbacks.redaction import redacted
from diffusion_trainer.callbacks.run import BEFORE_SAVE, RunCallback, crossed
from diffusion_trainer.conventions import UserError
from diffusion_trainer.evaluation.writing import whole
from diffusion_trainer.streaming.damage import Found
from diffusion_trainer.streaming.looking_ahead import ERROR_AHEAD

LIST = "damage.csv"
AT_LEAST = 10_000  # samples that a share is taken of
KEY = "damage"  # in the run's state
HEAD = ("images_seen", *Found._fields)


class CountDamage(RunCallback):
    """Replaced samples of all ranks, to the screen, the loggers and <folder>/damage.csv every `every_n_images`,
    and when a rank meets an error of the data that stops the run, what that rank has found.

    Counts and list are those of the whole run, restarts or not.

    budget: the share of the samples that may be damaged: of those since the start of this process, or (while there have
    been fewer) of an epoch's `count`, at most 10,000. Beyond it the run saves and stops.
    """

    turn = BEFORE_SAVE

    def __init__(self, budget: float, count: int | None, every_n_images: int = AT_LEAST):
        self.budget, self.every_n_images = budget, every_n_images
        self.at_least = min(count or AT_LEAST, AT_LEAST)

    def start(self) -> None:
        run, self._began = self.run, self.run.images_seen
        kept = {"counts": {}, "new": [], "unlisted": [], **run.state.get(KEY, {})}
        self._before: Counter[str] = Counter(kept["counts"])  # by kind, of the run until now
        self._counts: Counter[str] = Counter()  # by kind, of this process
        self._shards: Counter[tuple[str, str]] = Counter()  # by kind and shard, of this process
        # With the images seen then: what is not yet counted, and (of the first rank) not yet listed, on a full disk.
        self._new, self._unlisted = (
            [(at, Found(*found)) for at, found in kept[name]] if run.first else [] for name in ("new", "unlisted")
        )
        self._listed: set[tuple[str, ...]] | None = None if run.first else set()
        self._error: dict | None = None  # of this rank's data, in the next step
        if run.first:
            with run.going_on(LIST):
                self._listed = self._forget_after(self._began)

    def before_save(self) -> None:
        shares = self.run.agreement.gather((self._new, self._unlisted))
        new, unlisted = ([f for share in kind for f in share] for kind in zip(*shares, strict=True))
        self.run.state[KEY] = {"counts": self._before + self._counts, "new": new, "unlisted": unlisted}

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        self._error = batch if "error" in batch else batch.get(ERROR_AHEAD)
        if "error" in batch:  # in the first step: this rank alone ends here, and the others cannot be asked
            found = [*self._new, *self._in_error()]
            with self.run.going_on(LIST):  # the error of the data is what is to be told
                self._write([*self._unlisted, *found])
            if found:
                self._tell(found)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        self._new += self._at(batch["damage"])
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def _in_error(self) -> list[tuple[int, Found]]:
        """Of a step that is not taken: whoever goes on forgets it (`_forget_after`), and finds it again, or not."""
        damage = self._error.get("damage", ()) if self._error else ()
        return [(self.run.images_seen + self.run.module.progress.batch_size, f) for f in damage]

    def _at(self, found: Sequence[Found]) -> list[tuple[int, Found]]:
        return [(self.run.images_seen, f) for f in found]

    def after_step(self, previous: int) -> None:
        run = self.run
        done = run.images_seen >= run.module.progress.num_images
        if not done and not crossed(previous, run.images_seen, self.every_n_images):
            return
        too_many, found = self._weigh()
        if found:
            self._log()
        if too_many:
            run.save()
            raise UserError(self._verdict())

    def on_train_end(self, trainer, module) -> None:
        too_many, _ = self._weigh()  # a stop came between two marks, and has saved: what it found is logged at the next
        if self.run.failure:
            self._list([f for share in self.run.agreement.gather(self._in_error()) for f in share])
        elif too_many:
            raise UserError(self._verdict())

    def _weigh(self) -> tuple[bool, bool]:
        """Whether it is too many, and whether any are new. All ranks must ask: what they have found since the last time
        is told, and weighed against the budget.
        """
        found = [f for share in self.run.agreement.gather(self._new) for f in share]
        self._new = []
        self._list(found)
        return bool(found) and sum(self._counts.values()) > self.budget * self._seen, bool(found)

    def _list(self, found: Sequence[tuple[int, Found]]) -> None:
        if found:
            self._tell(found)
        if self.run.first:
            self._unlisted += found
            with self.run.going_on(LIST):
                self._write(self._unlisted)
                self._unlisted = []

    def _tell(self, found: Sequence[tuple[int, Found]]) -> None:
        self._counts.update(f.kind for _, f in found)
        self._shards.update((f.kind, f.shard) for _, f in found)
        counts = self._before + self._counts
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
        self.run.say(
            f"  {sum(counts.values()):,} damaged samples were replaced ({kinds}); {self.run.folder / LIST} lists them"
        )

    def _log(self) -> None:
        counts = self._before + self._counts
        self.run.log({"data/damaged": sum(counts.values()), **{f"data/damaged_{k}": n for k, n in counts.items()}})

    def _write(self, found: Sequence[tuple[int, Found]]) -> None:
        """All of it; or, with an OSError, none."""
        if not found:
            return
        if self._listed is None:  # there was no room as the run began
            self._listed = self._forget_after(self._began)
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        with (self.run.folder / LIST).open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            if not before:
                rows.writerow(HEAD)
            rows.writerows(row for row in map(_row, sorted(found)) if row not in self._listed)
            left = text.getvalue().encode(errors="backslashreplace")
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise

    def _forget_after(self, images_seen: int) -> set[tuple[str, ...]]:
        """What the list goes on from. A lost step will find its damage again, and a stop has listed what is yet to be
        counted.
        """
        path = self.run.folder / LIST
        if not path.is_file():
            return set()
        with path.open(newline="") as file:
            kept = [tuple(row) for row in csv.reader(file) if len(row) == len(HEAD) and _number(row) <= images_seen]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([HEAD, *kept])
        if path.read_bytes() != text.getvalue().encode():  # a full disk has no room for the same once more
            with whole(path) as part:
                part.write_bytes(text.getvalue().encode())
        return set(kept)

    @property
    def _seen(self) -> int:
        return max(self.run.images_seen - self._began, self.at_least)

    def _verdict(self) -> str:
        worst = "\n".join(f"  {n:>8,} {kind:<14} {shard}" for (kind, shard), n in self._shards.most_common(20))
        return (
            f"{sum(self._counts.values()):,} of {self._seen:,} samples are damaged, data.damage_budget={self.budget:g} "
            f"allows fewer:\n{worst}\n"
            f"{self.run.folder / LIST} lists all. Mend the shards (diffusion-trainer inspect names what is wrong), or "
            "raise the budget; the same command then goes on from the checkpoint"
        )


def _row(found: tuple[int, Found]) -> tuple[str, ...]:
    return tuple(redacted(str(field)) for field in (found[0], *found[1]))


def _number(row: Sequence[str]) -> float:
    """Images seen of a row of the list; the head has none."""
    return int(row[0]) if row[0].isdecimal() else float("inf")
