"""No condition."""

from diffusion_trainer.conditioning.base import Conditioning


class Unconditional(Conditioning):
    """The network is told nothing; guidance has nothing to guide by."""

    fields = ()

    def __init__(self, dim: int = 0):
        super().__init__()
        if dim:
            raise ValueError(f"dim must be 0 without a condition, not {dim}")
        self.dim = 0

    def check(self, batch):
        return None

    def examples(self, count):
        return None

    def stand_in(self, count):
        return None

    def read(self, batch):
        return None

    def drop(self, condition, dropped):
        return None

    def null(self, condition):
        return None

    def forward(self, condition):
        return None
