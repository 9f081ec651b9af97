"""Handwritten digits as WebDataset shards, and a small classifier of them that measures generated ones.

    python data/digits.py --out shards/digits

The data are scikit-learn's `load_digits`: 1,797 grey images of 8x8 pixels in ten classes (the test half of the UCI
set "Optical Recognition of Handwritten Digits", Alpaydin and Kaynak 1998). Split, fixed: 1,500 for training, 297 held
out. Written: <out>/train-*.tar, <out>/heldout-*.tar (png + cls), <out>/classifier.pt (TorchScript: images in [-1, 1]
-> features, logits), and <out>/digits.json, written last, which says what is there. Done already? Then it does nothing.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from diffusion_trainer.streaming.order import permutation
from diffusion_trainer.streaming.writer import write_shards

VERSION = 2  # of what this recipe writes; raise it when that changes
TRAIN, SAMPLES_PER_SHARD = 1500, 250


def split() -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and the held-out images, always the same."""
    order = permutation(1797, "digits", "split")
    return order[:TRAIN], order[TRAIN:]


def samples(indices: np.ndarray, pixels: np.ndarray, labels: np.ndarray) -> Iterator[dict]:
    for i in indices:
        file = io.BytesIO()
        Image.fromarray(pixels[i]).save(file, format="png")
        yield {"__key__": f"{i:06d}", "png": file.getvalue(), "cls": str(labels[i]).encode()}


class Classifier(nn.Module):
    """Images (B, 1, 8, 8) in [-1, 1] -> features (B, 64), logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return features, self.head(features)


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 20) -> Classifier:
    """On shifted copies of the images, so that the features do not hang on exact places."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small only wait for each other's threads
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for step in range(steps):
        batch = torch.from_numpy(permutation(len(images), "classifier", step)[:100])
        shift = torch.randint(-1, 2, (2,)).tolist() if step % 2 else [0, 0]
        x = torch.roll(nn.functional.pad(images[batch], (1, 1, 1, 1), value=-1.0), shift, (2, 3))[:, :, 1:-1, 1:-1]
        loss = nn.functional.cross_entropy(net(x)[1], labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (net(images)[1].argmax(1) == labels).double().mean().item()


def save_atomically(path: Path, write) -> None:
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)


def write(out: Path) -> dict:
    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # the 17 levels stay apart
    train, heldout = split()
    shards = {
        name: [p.name for p in write_shards(samples(part, pixels, data.target), out, name, SAMPLES_PER_SHARD)]
        for name, part in {"train": train, "heldout": heldout}.items()
    }
    images = torch.from_numpy(pixels)[:, None].float() / 127.5 - 1
    labels = torch.from_numpy(data.target)
    net = train_classifier(images[train], labels[train])
    save_atomically(out / "classifier.pt", lambda path: torch.jit.save(torch.jit.script(net), str(path)))
    return {
        "version": VERSION,
        "samples": {"train": len(train), "heldout": len(heldout)},
        "shards": shards,
        "classifier_accuracy": {
            "train": accuracy(net, images[train], labels[train]),
            "heldout": accuracy(net, images[heldout], labels[heldout]),
        },
    }


def done(out: Path) -> bool:
    try:
        report = json.loads((out / "digits.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    shards = [name for names in report.get("shards", {}).values() for name in names]
    files = [*shards, "index.json", "classifier.pt"]
    return report.get("version") == VERSION and all((out / name).is_file() for name in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("shards/digits"), help="folder to write to")
    out = parser.parse_args().out
    if done(out):
        print(f"digits: {out} is complete already")
        return
    start = time.monotonic()
    (out / "digits.json").unlink(missing_ok=True)
    report = write(out)
    save_atomically(out / "digits.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    print(
        f"digits: {report['samples']['train']} training and {report['samples']['heldout']} held-out images in {out}, "
        f"classifier right on {report['classifier_accuracy']['heldout']:.1%} of the held-out ones "
        f"({time.monotonic() - start:.0f} s)"
    )


if __name__ == "__main__":
    main()
