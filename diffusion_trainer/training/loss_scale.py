"""Gradients of a float16 forward pass, kept within the range of float16."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

INITIAL = 2.0**16
MINIMUM, MAXIMUM = 1.0, 2.0**32


class LossScale:
    """A factor of the loss, a power of two, that its gradients are divided by (Micikevicius et al. 2018, section 3.2).

    Each parameter's gradient is divided as it arrives, in fp32 and before it is added up, reduced or clipped: no
    strategy knows of the factor, and all take the same steps. A step whose gradient is not finite is not taken, and
    halves the factor; `double_after` taken in a row double it. It stays on the device, which nobody waits for.
    """

    def __init__(self, scale: float = INITIAL, double_after: int = 2000):
        self.double_after = double_after  # steps
        self.scale = torch.tensor(scale)
        self.good_steps = torch.tensor(0.0)
        self.to_blame: Tensor | float = 0.0  # 1 if the last step was not taken and the scale could be halved for it

    def attach(self, parameters: Iterable[nn.Parameter]) -> None:
        """All that the loss depends on, once."""
        for parameter in parameters:
            parameter.register_hook(lambda gradient: gradient / self.scale)

    def __call__(self, loss: Tensor) -> Tensor:
        self.scale, self.good_steps = (n.to(loss.device, non_blocking=True) for n in (self.scale, self.good_steps))
        return loss * self.scale

    @torch.no_grad()
    def after_step(self, kept: Tensor | float) -> None:
        """kept: 1 if the step was taken, 0 if it was not, the same on all ranks."""
        self.to_blame = (1 - kept) * (self.scale > MINIMUM)
        good = (self.good_steps + 1) * kept
        doubles = (good >= self.double_after).float()
        self.scale = (self.scale * ((1 - kept) / 2 + kept * (1 + doubles))).clamp(MINIMUM, MAXIMUM)
        self.good_steps = good * (1 - doubles)

    def state(self) -> dict[str, Any]:
        """JSON. Waits for the device."""
        return {"scale": float(self.scale), "good_steps": float(self.good_steps)}

    def load_state(self, state: dict[str, Any]) -> None:
        device = self.scale.device
        self.scale, self.good_steps = (torch.tensor(state[k], device=device) for k in ("scale", "good_steps"))
