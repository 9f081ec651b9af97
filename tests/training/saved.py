"""Small models, and checkpoints of them by one rank and by two."""

import os
from multiprocessing import Pipe
from threading import Thread

import torch

from diffusion_trainer.training import checkpoints
from diffusion_trainer.training.agreement import Agreement
from diffusion_trainer.training.ema import KEY, attach_ema
from diffusion_trainer.training.nonfinite import NonFinite
from diffusion_trainer.training.sharding import Replicated, Slot


def trained(seed: int = 0) -> Replicated:
    """A small model after a step of AdamW with an EMA."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    attach_ema(optimizer, {KEY: lambda: 0.9}, NonFinite(optimizer))
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return Replicated(model, optimizer)


class Half(Replicated):
    """One half of each parameter: what ZeRO gives to one of two ranks."""

    replicated = False

    def __init__(self, whole: Replicated, rank: int):
        super().__init__(whole.model, whole.optimizer, replicated=False)
        object.__setattr__(self, "rank", rank)

    def slots(self):
        for slot in super().slots():
            at = [0, slot.count // 2, slot.count][self.rank : self.rank + 2]
            yield Slot(slot.name, at[0], at[1] - at[0], slot.master, at[0])


class Piped:
    """What Agreement is, for two ranks with a pipe between them."""

    world = 2

    def __init__(self, rank: int, end):
        self.rank, self.end = rank, end

    def gather(self, value):
        self.end.send(value)
        other = self.end.recv()  # EOFError where the other has died
        return [value, other] if self.rank == 0 else [other, value]


def save(root, images, sharding=None, keep=2):
    return checkpoints.save(root, images, sharding or trained(images), {"run_id": "x"}, Agreement(), keep)


def save_by_two(root, images, keep=2, seed=None):
    """The errors of the two ranks."""
    errors, whole = [None, None], trained(images if seed is None else seed)

    def rank(r, end):
        try:
            checkpoints.save(root, images, Half(whole, r), {"run_id": "x"}, Piped(r, end), keep)
        except OSError as error:
            errors[r] = error

    threads = [Thread(target=rank, args=(r, end)) for r, end in enumerate(Pipe())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def content(sharding: Replicated) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds of it, by kind and name."""
    found = {}
    for name, _, _, master, _ in sharding.slots():
        state = {k: v for k, v in sharding.optimizer.state[master].items() if v.dim()}
        found |= {f"{kind}/{name}": tensor.detach().clone() for kind, tensor in {"weight": master, **state}.items()}
    return found


def read(checkpoint) -> dict[str, torch.Tensor]:
    """The same, of a checkpoint."""
    return {f"{kind}/{n}": t for kind in checkpoint.kinds for n, t in checkpoint.whole(kind).items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def forked(work) -> int:
    """A copy of this process that does `work` and nothing else; its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def ended(pid: int) -> int:
    """The exit code, or minus the signal that it died of."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
