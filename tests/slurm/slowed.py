"""The console command on a node that is slow: each product of matrices takes it a dozen times as many, and it sends and
receives as late.
"""

import time

import torch
from torch import distributed

from diffusion_trainer.apps import cli

TIMES, SECONDS = 12, 1.5
mm, isend = torch.mm, distributed.isend


def slow_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    for _ in range(TIMES - 1):
        mm(a, b)
    return mm(a, b)


def slow_wire(*what):
    """What is received is waited for only after this."""
    time.sleep(SECONDS)
    return isend(*what)


if __name__ == "__main__":
    torch.mm, distributed.isend = slow_product, slow_wire
    cli.main()
