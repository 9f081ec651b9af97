"""A callback that writes down what a run computed: for tests, named in a configuration through allowed_targets."""

import hashlib
import json

import torch

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.callbacks.run import RunCallback
from diffusion_trainer.training.checkpoints import WEIGHT
from diffusion_trainer.training.ema import KEY


class Spy(RunCallback):
    """<folder>/spy-<started at>.pt: samples, losses, weights, EMA, and the EMA by its closed form."""

    def __init__(self, swap_every: int = 0):
        self.swap_every = swap_every

    def start(self) -> None:
        self.ledger, self.losses, self.differences = [], [], []
        self.tracks = self.run.module.ema.tracks
        self.expected = {key: self.whole(key if self.run.images_seen else WEIGHT) for key in self.tracks}
        self.began = self.run.images_seen

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        """Every parameter, gathered from the ranks' runs of elements."""
        sharding = self.run.sharding
        mine = []
        for slot in sharding.slots():
            source = slot.master.data if kind == WEIGHT else sharding.optimizer.state[slot.master][kind]
            mine.append((slot.name, slot.first, source.reshape(-1)[slot.at : slot.at + slot.count].clone()))
        out: dict[str, dict[int, torch.Tensor]] = {}
        for runs in self.run.agreement.gather(mine):
            for name, first, run in runs:
                out.setdefault(name, {})[first] = run
        return {name: torch.cat([runs[k] for k in sorted(runs)]) for name, runs in out.items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        pieces = module.progress.batch_size // len(batch["image"])
        for i, (image, label) in enumerate(zip(batch["image"], batch["label"], strict=True)):
            digest = hashlib.sha256(image.numpy().tobytes() + bytes([int(label)])).hexdigest()[:16]
            self.ledger.append((batch["first"] + i * pieces, digest))
        self.micro = [*getattr(self, "micro", []), module.last_terms.loss.mean().item()]
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def after_step(self, previous: int) -> None:
        run = self.run
        self.losses += run.agreement.mean([sum(self.micro) / len(self.micro)])
        self.micro = []
        weights, batch = self.whole(WEIGHT), run.module.progress.batch_size
        for key, track in self.tracks.items():
            decay, expected = track.decay(previous, batch), self.expected[key]
            self.expected[key] = {n: decay * e + (1 - decay) * weights[n] for n, e in expected.items()}
            average = self.whole(key)
            self.differences.append(max(float((average[n] - e).abs().max()) for n, e in self.expected[key].items()))
        if self.swap_every and len(self.losses) % self.swap_every == 0:
            self.swap(weights, self.whole(KEY))

    def swap(self, weights, average) -> None:
        """Inside, the forward pass must compute what the averages compute; after, the masters are bitwise the same."""
        model, x = self.run.module.model, torch.ones(2, 1, 8, 8)
        ask = lambda: model(x, torch.zeros(2), torch.tensor([1, 2]))  # noqa: E731
        with torch.no_grad():
            before = ask()
            with self.run.sharding.swapped(KEY):
                inside = ask()
                assert all(torch.equal(w, average[n]) for n, w in self.whole(WEIGHT).items())
            assert torch.equal(ask(), before)
            assert not torch.equal(inside, before)
        assert all(torch.equal(w, weights[n]) for n, w in self.whole(WEIGHT).items())

    def on_train_end(self, trainer, module) -> None:
        ledger = sorted(entry for share in self.run.agreement.gather(self.ledger) for entry in share)
        report = {
            "ledger": ledger, "losses": self.losses, "weights": self.whole(WEIGHT), "ema": self.whole(KEY),
            "ema_error": max(self.differences), "moments": self.whole("exp_avg_sq"),
        }  # fmt: skip
        if self.run.first:
            torch.save(report, self.run.folder / f"spy-{self.began}.pt")


class Poison(RunCallback):
    """Makes a NaN of one gradient of the last rank, in steps whose first sample's number is in [first, last)."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def start(self) -> None:
        agreement = self.run.agreement
        if agreement.rank == agreement.world - 1:
            parameter = next(p for p in self.run.module.model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * (float("nan") if self.bad else 1.0))

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.bad = self.first <= batch["first"] < self.last


class Ledger(RunCallback):
    """<folder>/ledger-<rank>.jsonl: of each sample this rank has trained on, its number in the stream and its key.

    Written as it happens, so that a process that is killed leaves what it has done.
    """

    def start(self) -> None:
        self.data = build(configuration.read(self.run.folder / "config.yaml")["data"], "data")
        self.file = (self.run.folder / f"ledger-{self.run.agreement.rank}.jsonl").open("a", buffering=1)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        pieces = module.progress.batch_size // len(batch["image"])
        for i, (shard, sample) in enumerate(batch["samples"].tolist()):
            key = f"{self.data.samples.shards[shard].url}:{self.data.samples.key(shard, sample)}"
            self.file.write(json.dumps([batch["first"] + i * pieces, key]) + "\n")
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)


class Trap(RunCallback):
    """Breaks one rank once `at` images have been seen."""

    def __init__(self, at: int, rank: int):
        self.at, self.rank = at, rank

    def after_step(self, previous: int) -> None:
        if self.run.images_seen == self.at and self.run.agreement.rank == self.rank:
            raise RuntimeError(f"the trap at {self.at}")
