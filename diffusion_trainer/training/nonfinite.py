"""Steps whose loss or gradient is not finite are not taken, and nobody waits for the device to know."""

from collections.abc import Callable, Mapping
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def spoiled(loss: Tensor) -> Tensor:
    """A finite loss, of any shape, bit for bit; NaN, and so is its gradient, where it is not finite.

    The gradient need not be so by itself: x^2 overflows where 2x does not. So all ranks see it in the reduction that
    there is.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, nan)


class DecidesItself:
    """A strategy that skips steps whose norm is not finite, and clips: it has the norm over all ranks."""


class NonFinite:
    """Makes a fused optimizer of torch skip steps whose gradient has a norm that is not finite in float32 (of which the
    second moments would not be): weights, moments and step counters stay as they are. Others it clips to `clip_norm`.

    Gradients must have been reduced over the ranks, so that all see the same. torch looks for `found_inf` on the
    device; that is what its GradScaler uses. A parameter without a gradient has that of zero, as under ZeRO.

    decided: by the strategy (`DecidesItself`). It does not call the optimizer for a step that it skips: who takes a
    step calls `forget` before it.
    """

    def __init__(self, optimizer: Optimizer, clip_norm: float | None = None, decided: bool = False):
        self.clip_norm, self.decided = clip_norm, decided
        self.kept: Tensor | float = 1.0  # 0 or 1, on the device: whether the step that is being taken is kept
        optimizer.register_step_pre_hook(self._before)

    def forget(self) -> None:
        """A step that does not come to the optimizer is not kept."""
        self.kept = 0.0

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: Mapping[str, Any]) -> tuple | None:
        # Lightning computes the gradients inside step(), in the closure that it hands over.
        closure: Callable[[], Any] | None = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._look(optimizer)
            return None
        with torch.enable_grad():
            loss = closure()
        self._look(optimizer)
        return (optimizer,), {"closure": lambda: loss}

    @torch.no_grad()
    def _look(self, optimizer: Optimizer) -> None:
        self.kept = 1.0
        if self.decided:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self.kept = norm.isfinite().float()
        optimizer.found_inf = 1 - self.kept
