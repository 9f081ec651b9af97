"""A callback that writes down what a run computed: for tests, named in a configuration through allowed_targets."""

import ctypes
import hashlib
import json
import os
import time
from pathlib import Path

import torch

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.nodes import build
from diffusion_trainer.callbacks.loggers import LoggerChoice
from diffusion_trainer.callbacks.run import BEFORE_SAVE, LAST, RunCallback
from diffusion_trainer.callbacks.run_logger import RunLogger
from diffusion_trainer.training.checkpoints import WEIGHT
from diffusion_trainer.training.ema import KEY

MOMENTS = ("exp_avg", "exp_avg_sq")


class Spy(RunCallback):
    """<folder>/spy-<started at>.pt: samples, losses, weights, averages, moments, and the averages by their closed form.

    A step that is not kept must leave every bit of them.
    """

    def __init__(self, swap_every: int = 0):
        self.swap_every = swap_every

    def start(self) -> None:
        self.ledger, self.losses, self.micro, self.kept, self.differences = [], [], [], [], []
        self.began, self.tracks = self.run.images_seen, self.run.module.ema.tracks
        self.kinds = (WEIGHT, *MOMENTS, *self.tracks)
        self.before = {kind: self.whole(kind) for kind in self.kinds} if self.began else {}
        initial = {key: self.whole(key if self.began else WEIGHT) for key in self.tracks}
        self.expected = {key: {n: run.double() for n, run in initial[key].items()} for key in self.tracks}

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
        self.micro.append(module.last_terms.loss.mean().item())
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def after_step(self, previous: int) -> None:
        run = self.run
        self.losses += run.agreement.mean([sum(self.micro) / len(self.micro)])
        self.micro = []
        self.kept.append(float(run.module.nonfinite.kept))
        now, batch = {kind: self.whole(kind) for kind in self.kinds}, run.module.progress.batch_size
        if not self.kept[-1] and self.before:
            assert all(torch.equal(run, self.before[kind][n]) for kind in self.kinds for n, run in now[kind].items())
        for key, track in self.tracks.items():
            decay = track.decay(previous, batch) if self.kept[-1] else 1.0
            self.expected[key] = {
                n: decay * e + (1 - decay) * now[WEIGHT][n].double() for n, e in self.expected[key].items()
            }
            self.differences.append(max(float((now[key][n] - e).abs().max()) for n, e in self.expected[key].items()))
        if self.swap_every and len(self.losses) % self.swap_every == 0:
            self.swap(now[WEIGHT], now[KEY])
        self.before = now

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
        now = {kind: self.whole(kind) for kind in self.kinds}
        report = {
            "ledger": ledger, "losses": self.losses, "kept": self.kept, "ema_error": max(self.differences),
            "weights": now[WEIGHT], "ema": now[KEY], "moments": now["exp_avg_sq"],
            "all": {f"{kind}/{n}": run for kind in now for n, run in now[kind].items()},
        }  # fmt: skip
        if self.run.first:
            torch.save(report, self.run.folder / f"spy-{self.began}.pt")


class Poison(RunCallback):
    """Puts a number into one gradient of the last rank, in steps whose first sample's number is in [first, last): in
    the first of their micro-batches.
    """

    def __init__(self, first: int, last: int, by: float = float("nan")):
        self.first, self.last, self.by = first, last, by

    def start(self) -> None:
        agreement = self.run.agreement
        if agreement.rank == agreement.world - 1:
            parameter = next(p for p in self.run.module.model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: self.spoiled(gradient) if self.bad else None)

    def spoiled(self, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = self.by
        return gradient

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.bad = self.first <= batch["first"] < self.last and batch_idx % trainer.accumulate_grad_batches == 0


class Raise(Poison):
    """Adds `by` to the loss there, which changes no gradient."""

    def start(self) -> None:
        agreement, module = self.run.agreement, self.run.module
        if agreement.rank == agreement.world - 1:
            module.objective = Raised(module.objective, self)


class Raised:
    """The objective, with what is added to its losses."""

    def __init__(self, inner, spy: Raise):
        self.inner, self.spy = inner, spy

    def __call__(self, *arguments):
        terms = self.inner(*arguments)
        return terms._replace(loss=terms.loss + self.spy.by) if self.spy.bad else terms

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Alerts(LoggerChoice):
    """<folder>/alerts.jsonl: the title and the text of each."""

    def build(self, folder, name, run_id, config, started_at):
        return AlertFile(folder / "alerts.jsonl")


class AlertFile(RunLogger):
    name = "alerts"

    def __init__(self, path):
        super().__init__()
        self.path = path

    def log_metrics(self, metrics, step=None):
        return None

    def alert(self, title, text):
        with self.path.open("a") as file:
            file.write(json.dumps([title, text]) + "\n")


class Ledger(RunCallback):
    """<folder>/ledger-<rank>.jsonl: of each sample this rank has trained on, its number in the stream and its key.

    Written as it happens, so that a process that is killed leaves what it has done: before the step is saved, or what
    a kill in an evaluation leaves would lack a step that is not taken again.
    """

    turn = BEFORE_SAVE

    def start(self) -> None:
        config = configuration.read(self.run.folder / "config.yaml")
        self.data = build(config["data"], "data", config["allowed_targets"])
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


class Stuck(RunCallback):
    """Before the first batch the last rank sleeps; the others hang in their first step, where Python runs no more. In
    the first start of a job.
    """

    turn = LAST + 1  # the heartbeat has noted that the step begins

    def start(self) -> None:
        self.due = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"

    def on_train_epoch_start(self, trainer, module) -> None:
        if self.due and self.run.agreement.rank == self.run.agreement.world - 1:
            time.sleep(1000)

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        if not self.due:
            return
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)


class Built(RunCallback):
    """built-<rank>, where the run was started, once the rank has made its callbacks; its model comes before them."""

    def __init__(self):
        Path(f"built-{os.environ['RANK']}").touch()
