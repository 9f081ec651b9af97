"""Damaged samples: counted, listed, and too many of them stop the run."""

import csv
from collections import Counter
from collections.abc import Sequence

from diffusion_trainer.callbacks.run import RunCallback, crossed
from diffusion_trainer.conventions import UserError
from diffusion_trainer.streaming.damage import Found

LIST = "damage.csv"
AT_LEAST = 10_000  # samples that a share is taken of


class CountDamage(RunCallback):
    """Replaced samples of all ranks, to the screen, the loggers and <folder>/damage.csv every `every_n_images`,
    and when a rank meets an error of the data that stops the run, what that rank has found.

    budget: the share of the samples that may be damaged: of those since the start of this process, or (while there have
    been fewer) of an epoch's `count`, at most 10,000. Beyond it the run saves and stops.
    """

    def __init__(self, budget: float, count: int | None, every_n_images: int = AT_LEAST):
        self.budget, self.every_n_images = budget, every_n_images
        self.at_least = min(count or AT_LEAST, AT_LEAST)

    def start(self) -> None:
        self._new: list[Found] = []
        self._counts: Counter[str] = Counter()  # by kind
        self._shards: Counter[tuple[str, str]] = Counter()  # by kind and shard
        self._began = self.run.images_seen

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        if "error" in batch:  # this rank alone ends here: the others cannot be asked, and may not have come so far
            found = [*self._new, *batch.get("damage", ())]
            if found:
                self._write(found)
                self._tell(found)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        self._new += batch["damage"]
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def after_step(self, previous: int) -> None:
        run = self.run
        done = run.images_seen >= run.module.progress.num_images
        if not done and not crossed(previous, run.images_seen, self.every_n_images):
            return
        if self._too_many():
            run.save()
            raise UserError(self._verdict())

    def on_train_end(self, trainer, module) -> None:
        if self._too_many():  # a stop came between two marks, and has saved
            raise UserError(self._verdict())

    def _too_many(self) -> bool:
        """All ranks must ask: what they have found since the last time is told, and weighed against the budget."""
        found = [f for share in self.run.agreement.gather(self._new) for f in share]
        self._new = []
        if found:
            if self.run.first:
                self._write(found)
            self._tell(found)
        return bool(found) and sum(self._counts.values()) > self.budget * self._seen

    def _tell(self, found: Sequence[Found]) -> None:
        run = self.run
        self._counts.update(f.kind for f in found)
        self._shards.update((f.kind, f.shard) for f in found)
        total = sum(self._counts.values())
        run.log({"data/damaged": total, **{f"data/damaged_{kind}": n for kind, n in self._counts.items()}})
        kinds = ", ".join(f"{n} {kind}" for kind, n in self._counts.most_common())
        run.say(f"  {total:,} damaged samples were replaced ({kinds}); {run.folder / LIST} lists them")

    def _write(self, found: Sequence[Found]) -> None:
        path = self.run.folder / LIST
        new = not path.exists()
        with path.open("a", newline="") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(("images_seen", *Found._fields))
            rows.writerows((self.run.images_seen, *f) for f in found)

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
