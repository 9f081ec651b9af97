"""The data set of tiny.py with an embedding of each image's class, in several tokens, and what recognises the class."""

import io
from pathlib import Path

import numpy as np
import tiny
import torch
from torch import Tensor, nn

from diffusion_trainer.streaming.writer import write_shards

WIDTH, TOKENS = 16, 3
CODES = np.random.default_rng(1).normal(size=(10, WIDTH)).astype(np.float16)  # of the classes


class Bars(nn.Module):
    """(B, 1, 8, 8) -> features (B, 10), logits (B, 10): how bright is the bar of each class."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = images.mean(3).flatten(1), images.mean(2).flatten(1)
        bright = torch.cat([rows, columns[:, :4].mean(1, keepdim=True), columns[:, 4:].mean(1, keepdim=True)], dim=1)
        return bright, bright


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tokens_of(label: int) -> np.ndarray:
    """(TOKENS, WIDTH), the last of them padding."""
    return np.stack([CODES[label]] * (TOKENS - 1) + [np.zeros(WIDTH, np.float16)])


def write(folder: Path, count: int = 100) -> None:
    """Shards, examples.npy and features.pt."""
    samples = ({**s, "text.npy": npy(tokens_of(int(s["cls"])))} for s in tiny.samples(count))
    write_shards(samples, folder / "captioned", "train", 60)
    np.save(folder / "examples.npy", np.stack([tokens_of(label) for label in range(10)]))
    torch.jit.save(torch.jit.script(Bars()), str(folder / "features.pt"))


def overrides(folder: Path) -> list[str]:
    """Of `train`, on what `write` has written; with an evaluation."""
    shape = [TOKENS, WIDTH]
    field = f"{{_target_: diffusion_trainer.streaming.arrays.Array, shape: {shape}, extension: text.npy}}"
    return [
        "experiment=digits", "data=captioned", f"data.shards='{folder}/captioned/train-*.tar'", "data.num_workers=0",
        "data.fields.image.channels=1", "data.fields.image.height=8", "data.fields.image.width=8",
        f"data.fields.embedding.shape={shape}", "conditioning=embedding", f"conditioning.width={WIDTH}",
        "conditioning.dim=8", f"conditioning.examples='{folder}/examples.npy'",
        f"evaluation.reference.shards=['{folder}/captioned/train-*.tar']",
        f"+evaluation.reference.fields.embedding={field}", f"evaluation.features='{folder}/features.pt'",
        "evaluation.num_samples=24", "evaluation.batch_size=24", "sampler.num_steps=3", "batch_size=32", "lanes=4",
        "logger=csv", "strategy=single", "trainer.accelerator=cpu", *tiny.NETWORK, "network.attention_levels=[]",
    ]  # fmt: skip
