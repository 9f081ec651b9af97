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
    """Replaced samples of all ranks, to the screen, the loggers and <folder>/damage.csv every `every_n_images`.

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

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx: int) -> None:
        self._new += batch["damage"]
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def after_step(self, previous: int) -> None:
        run = self.run
        done = run.images_seen >= run.module.progress.num_images
        if not done and not crossed(previous, run.images_seen, self.every_n_images):
            return
        found = [f for share in run.agreement.gather(self._new) for f in share]
        self._new = []
        if found:
            self._tell(found)

    def _tell(self, found: Sequence[Found]) -> None:
        run = self.run
        self._counts.update(f.kind for f in found)
        self._shards.update((f.kind, f.shard) for f in found)
        total = sum(self._counts.values())
        if run.first:
            self._write(found)
        run.log({"data/damaged": total, **{f"data/damaged_{kind}": n for kind, n in self._counts.items()}})
        kinds = ", ".join(f"{n} {kind}" for kind, n in self._counts.most_common())
        run.say(f"  {total:,} damaged samples were replaced ({kinds}); {run.folder / LIST} lists them")
        seen = max(run.images_seen - self._began, self.at_least)
        if total > self.budget * seen:
            run.save()
            raise UserError(self._verdict(total, seen))

    def _write(self, found: Sequence[Found]) -> None:
        path = self.run.folder / LIST
        new = not path.exists()
        with path.open("a", newline="") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(("images_seen", *Found._fields))
            rows.writerows((self.run.images_seen, *f) for f in found)

    def _verdict(self, total: int, seen: int) -> str:
        worst = "\n".join(f"  {n:>8,} {kind:<14} {shard}" for (kind, shard), n in self._shards.most_common(20))
        return (
            f"{total:,} of {seen:,} samples are damaged, data.damage_budget={self.budget:g} allows fewer:\n{worst}\n"
            f"{self.run.folder / LIST} lists all. Mend the shards (diffusion-trainer inspect names what is wrong), or "
            "raise the budget; the same command then goes on from the checkpoint"
        )
