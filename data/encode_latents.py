"""Shards of images and captions -> shards of latents and text embeddings, so that training need not encode them.

    python data/encode_latents.py 'shards/photos/train-*.tar' --out shards/latents --image-encoder encoder.pt
    torchrun --nproc-per-node 8 data/encode_latents.py ... (or srun): each rank encodes every eighth shard

Encoders are TorchScript files. Image encoder: (B, 3, H, W) in [-1, 1] -> (B, c, h, w), written as latent.npy in place
of the image. Text encoder: list[str] -> (B, D) or (B, L, D), written as text.npy; captions are read from txt. Shard k
of the input, which must have an index, becomes shard k; keys stay, and so do cls, json and txt. Samples that are
damaged are left out and listed; with --strict they stop the recipe.

<out>/<name>.json says what was done; to have the encoder's latents again: z = latent * std + mean, channel by channel.
"""

import os
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from encoders import Encoder, npy, pixels, place

from diffusion_trainer.conventions import UserError, cores
from diffusion_trainer.streaming.damage import Damage, MissingField, MissingShard, Undecodable
from diffusion_trainer.streaming.index import Shard
from diffusion_trainer.streaming.recipes import Job, Recipe, Skip, fingerprint, read_json, write_json
from diffusion_trainer.streaming.samples import Samples
from diffusion_trainer.streaming.stores import LocalStore
from diffusion_trainer.streaming.writer import beside, staging
from diffusion_trainer.streaming.writing import arguments, positive, script, write

VERSION = 2  # of the shards; raise it when they change
IMAGES = ("jpg", "jpeg", "png", "webp")
CARRIED = ("cls", "json", "txt")
DTYPES = {"float16": np.float16, "float32": np.float32}
MAX_SAMPLE_BYTES = 1 << 28
BATCHES_AHEAD = 2  # that are being decoded while one is encoded
MEASURED_SHARDS = 16  # that the samples for --normalize are taken from, at most


class Row(NamedTuple):
    """A sample that is being decoded."""

    key: str
    members: Mapping[str, bytes]
    pixels: Future | None  # (H, W, 3) uint8
    text: str | None


class Encoded(NamedTuple):
    """A sample as the encoders give it."""

    key: str
    members: Mapping[str, bytes]
    latent: np.ndarray | None  # (c, h, w)
    text: np.ndarray | None  # (D,) or (L, D)


@dataclass(frozen=True, eq=False)
class Latents(Recipe):
    shards: tuple[Shard, ...]
    image_encoder: Encoder | None
    text_encoder: Encoder | None
    size: int | None
    batch_size: int
    dtype: str
    scale: float
    normalize: int | None  # samples that mean and deviation are measured on; None: they are 0 and 1 / scale
    measured: Path  # where these are kept while the set is unfinished
    threads: int  # that decode images

    @property
    def settings(self) -> dict:
        return {
            "recipe": "encode_latents",
            "version": VERSION,
            "shards": len(self.shards),
            "input": fingerprint((os.path.basename(s.url), s.samples, s.crc32) for s in self.shards),
            "image_encoder": self.image_encoder.sha256 if self.image_encoder else None,
            "text_encoder": self.text_encoder.sha256 if self.text_encoder else None,
            "size": self.size,
            "batch_size": self.batch_size,  # rounding depends on it
            "dtype": self.dtype,
            "scale": self.scale,
            "normalize": self.normalize,
        }

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    @cached_property
    def _source(self) -> Samples:
        return Samples(self.shards, LocalStore(), MAX_SAMPLE_BYTES)

    @property
    def facts(self) -> dict:
        return {"latents": self.normalization} if self.image_encoder else {}

    @cached_property
    def normalization(self) -> dict[str, list[float]]:
        """Mean and std of each channel (or of all at once). What one rank has measured holds for all."""
        if self.normalize is None:
            return {"mean": [0.0], "std": [1 / self.scale]}
        if not self.measured.exists():
            part = beside(self.measured)
            write_json(part, self._measure())
            with suppress(FileExistsError):  # another rank was first
                os.link(part, self.measured)
            part.unlink()
        return read_json(self.measured, dict, f"remove {self.measured.parent} to begin anew")

    def _measure(self) -> dict[str, list[float]]:
        """From the first samples of shards that lie evenly in the set."""
        count = min(len(self.shards), MEASURED_SHARDS)
        chosen = [len(self.shards) * i // count for i in range(count)]
        each = -(-self.normalize // count)
        z = [e.latent for k in chosen for e in islice(self._encoded(k, lambda message: None), each)]
        if not z:
            raise UserError("--normalize: none of the samples that it would measure can be used")
        channels = np.concatenate([latent.reshape(len(latent), -1) for latent in z], axis=1).astype(np.float64)
        mean, std = channels.mean(1), channels.std(1)
        if not (np.isfinite(mean).all() and (std > 0).all()):
            raise UserError(
                f"--normalize: a channel is constant or not finite (std {std.tolist()}); use --scale instead"
            )
        return {"mean": mean.tolist(), "std": std.tolist()}

    def samples(self, k: int, skip: Skip) -> Iterator[dict]:
        for encoded in self._encoded(k, skip):
            latent = None if encoded.latent is None else self._normalized(encoded.latent)
            arrays = {"latent.npy": latent, "text.npy": encoded.text}
            with np.errstate(over="ignore"):  # is seen below
                stored = {name: a.astype(DTYPES[self.dtype]) for name, a in arrays.items() if a is not None}
            bad = [name for name, array in stored.items() if not np.isfinite(array).all()]
            if bad:
                skip(f"{self._where(k, encoded.key)}: {bad[0]} is not finite as {self.dtype}")
                continue
            kept = CARRIED if self.image_encoder else CARRIED + IMAGES
            carried = {name: data for name, data in encoded.members.items() if name in kept}
            yield {"__key__": encoded.key} | carried | {name: npy(array) for name, array in stored.items()}

    def _normalized(self, latent: np.ndarray) -> np.ndarray:
        shape = (-1, *(1,) * (latent.ndim - 1))
        mean, std = (np.array(self.normalization[name]).reshape(shape) for name in ("mean", "std"))
        return (latent - mean) / std

    def _encoded(self, k: int, skip: Skip) -> Iterator[Encoded]:
        """The samples of a shard in order. Its batches begin with it, so that they do not depend on other shards."""
        with ThreadPoolExecutor(self.threads) as pool:
            rows = self._rows(k, pool, skip)
            waiting: deque[list[Row]] = deque()
            while batch := list(islice(rows, self.batch_size)):
                waiting.append(batch)
                if len(waiting) > BATCHES_AHEAD:
                    yield from self._encode(k, waiting.popleft(), skip)
            for batch in waiting:
                yield from self._encode(k, batch, skip)

    def _rows(self, k: int, pool: ThreadPoolExecutor, skip: Skip) -> Iterator[Row]:
        for i in range(self.shards[k].samples):
            try:
                yield self._row(k, i, pool)
            except MissingShard as error:
                raise UserError(f"{self.shards[k].url}: {error}") from error
            except Damage as error:
                skip(f"{self._where(k, i)}: {error}")

    def _row(self, k: int, i: int, pool: ThreadPoolExecutor) -> Row:
        members = {name: bytes(data) for name, data in self._source.read(k, i).items()}
        image = next((members[name] for name in IMAGES if name in members), None)
        if self.image_encoder is not None and image is None:
            raise MissingField(f"it has no image, only {', '.join(members)}")
        if self.text_encoder is not None and "txt" not in members:
            raise MissingField(f"it has no txt, only {', '.join(members)}")
        try:
            text = members["txt"].decode() if self.text_encoder is not None else None
        except UnicodeDecodeError as error:
            raise Undecodable(f"txt is not UTF-8: {error}") from error
        job = pool.submit(pixels, image, self.size) if self.image_encoder is not None else None
        return Row(self._source.key(k, i), members, job, text)

    def _where(self, k: int, sample: int | str) -> str:
        return f"{os.path.basename(self.shards[k].url)}, sample {sample}"

    def _encode(self, k: int, batch: Sequence[Row], skip: Skip) -> Iterator[Encoded]:
        rows, images = [], []
        for row in batch:
            try:
                images.append(row.pixels.result() if row.pixels is not None else None)
                rows.append(row)
            except Damage as error:
                skip(f"{self._where(k, row.key)}: {error}")
        latents = self._latents(images) if self.image_encoder is not None else [None] * len(rows)
        encode_texts = self.text_encoder is not None and rows
        texts = self.text_encoder.texts([row.text for row in rows]) if encode_texts else [None] * len(rows)
        for row, latent, text in zip(rows, latents, texts, strict=True):
            yield Encoded(row.key, row.members, latent, text)

    def _latents(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Images of one shape are encoded at once."""
        by_shape = defaultdict(list)
        for i, image in enumerate(images):
            by_shape[image.shape].append(i)
        latents: dict[int, np.ndarray] = {}
        for group in by_shape.values():
            latents |= zip(group, self.image_encoder.images(np.stack([images[i] for i in group])), strict=True)
        return [latents[i] for i in range(len(images))]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+", help="paths, globs or braces")
    parser.add_argument("--image-encoder", type=Path, help="TorchScript file")
    parser.add_argument("--text-encoder", type=Path, help="TorchScript file")
    parser.add_argument("--size", type=positive, help="of images: the middle square is scaled to it; else as they are")
    parser.add_argument("--batch-size", type=positive, default=32, help="of the encoders")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of what is written")
    parser.add_argument("--scale", type=float, default=1.0, help="that latents are multiplied with")
    parser.add_argument(
        "--normalize", type=positive, metavar="N", help="mean 0 and deviation 1 by channel, measured on N samples"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first sample that is damaged")
    a = parser.parse_args()
    if a.image_encoder is None and a.text_encoder is None:
        raise UserError("say what to encode with: --image-encoder, --text-encoder or both")
    if not 0 < abs(a.scale) < float("inf") or (a.normalize and a.scale != 1):
        raise UserError("--scale must not be 0, and has no use together with --normalize")
    if a.normalize and a.image_encoder is None:
        raise UserError("--normalize is for latents: say --image-encoder")
    rank, world, device = place()
    image, text = (Encoder(p, device) if p is not None else None for p in (a.image_encoder, a.text_encoder))
    shards = tuple(shard for pattern in a.shards for shard in LocalStore().find(pattern))
    stored = (a.dtype, a.scale, a.normalize, staging(a.out, a.name) / "normalization.json")
    recipe = Latents(shards, image, text, a.size, a.batch_size, *stored, threads=min(cores(), 16))
    write(Job(recipe, a.out, a.name, a.strict), 1, rank, world)


if __name__ == "__main__":
    sys.exit(script(main))
