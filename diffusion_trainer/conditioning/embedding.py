"""What an encoder has made of a caption, or of anything else: a vector of the shards."""

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_trainer.conditioning.base import Conditioning
from diffusion_trainer.conventions import UserError


class Embedding(Conditioning):
    """A linear map of a float field of the batch, (B, width) or (B, tokens, width), to (B, dim).

    The condition is the mean over the tokens, scaled to a root mean square of 1: (B, width) float32. Tokens of zeros
    (padding) do not count, as they change the mean's length alone; other padding does. An embedding of zeros is the
    null condition: that of a sample without a caption. Mean over the tokens and a norm before the projection are those
    of Saharia et al. 2022 (Imagen, section 2.3 and appendix D.3.1), the norm without its mean and weights (Zhang and
    Sennrich 2019, eq. 4).

    field: its name in the batch. examples: an npy of embeddings (n, *shape), shaped as those of the shards, to draw
    pictures with in turn; null where nothing is to be drawn.
    """

    def __init__(self, width: int, dim: int, field: str = "embedding", examples: str | None = None):
        super().__init__()
        if width < 1 or dim < 1:
            raise ValueError(f"width and dim must be positive, not {width} and {dim}")
        self.width, self.dim, self.field, self.file = width, dim, field, examples
        self.fields = (field,)
        # Its bias is all that a null condition of zeros leaves: the learned null embedding. A parameter of its own
        # would be read by drop() and null(), outside of forward(), where ZeRO-3 has taken it away (its shape is (0,)).
        self.linear = nn.Linear(width, dim)

    def check(self, batch: Mapping[str, Tensor]) -> None:
        self._check(batch[self.field], f"the batch's {self.field}")

    def _check(self, given: Tensor, what: str) -> None:
        if not torch.is_tensor(given) or not given.is_floating_point():
            kind = given.dtype if torch.is_tensor(given) else type(given).__name__
            raise UserError(f"{what} is {kind}: an embedding is an array of floats (streaming.arrays.Array)")
        if given.dim() not in (2, 3) or given.shape[-1] != self.width or not prod(given.shape[1:]):
            raise UserError(
                f"{what} has the shape {tuple(given.shape)} in a batch: the model takes (B, {self.width}) or "
                f"(B, tokens, {self.width}) (conditioning.width)"
            )
        # The means, not the entries: what the network is told, and float32 that is too large for them shows as well.
        bad = (~_pooled(given).isfinite().all(1)).nonzero()
        if len(bad):
            raise UserError(f"{what} is not finite (NaN or infinity) in sample {int(bad[0])} of {len(given)}")

    def examples(self, count: int) -> Tensor:
        if self.file is None:
            raise UserError(
                "conditioning.examples is null, and there is nothing else to draw by: write some embeddings, shaped as "
                "the shards have them, with np.save('examples.npy', np.stack(embeddings)), and say "
                "conditioning.examples=examples.npy"
            )
        given = self._from_file(Path(self.file))
        return self.read({self.field: given[torch.arange(count) % len(given)]})

    def _from_file(self, path: Path) -> Tensor:
        try:
            with path.open("rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"conditioning.examples={path} cannot be read as npy ({error})") from error
        if array.dtype.kind != "f" or not len(array.shape) or not len(array):
            raise UserError(
                f"conditioning.examples={path} is {array.dtype} {array.shape}; it must be floats (n, *shape), n > 0"
            )
        given = torch.from_numpy(array.astype(np.float32))
        self._check(given, f"conditioning.examples={path}")
        return given

    def stand_in(self, count: int) -> Tensor:
        return torch.zeros(count, self.width)

    def read(self, batch: Mapping[str, Tensor]) -> Tensor:
        # Encoders differ in length by some hundred times (unit vectors of CLIP, T5's tens for each entry), and by
        # captions where the length says little: the direction is kept, in entries of the size that Linear begins with.
        pooled = _pooled(batch[self.field])
        rms = pooled.double().square().mean(1, keepdim=True).sqrt()  # float32 has no square of 1e-25 or 1e25
        return torch.where(rms > 0, pooled / rms, 0.0).float()

    def drop(self, condition: Tensor, dropped: Tensor) -> Tensor:
        return torch.where(dropped[:, None], 0.0, condition)

    def null(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def forward(self, condition: Tensor) -> Tensor:
        return self.linear(condition)


def _pooled(embedding: Tensor) -> Tensor:
    """(B, width) as it is, or the mean of (B, tokens, width) over its tokens; float32."""
    return embedding.float() if embedding.dim() == 2 else embedding.mean(1, dtype=torch.float32)
