"""diffusion-trainer inspect: what is in shards, what it looks like, how fast it can be read, and what is damaged."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median_low

import numpy as np
import torch
from PIL import Image

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.nodes import Schema
from diffusion_trainer.conventions import UserError, cores, plain
from diffusion_trainer.evaluation import pictures
from diffusion_trainer.streaming.damage import Found
from diffusion_trainer.streaming.inspecting import (
    WHOLE,
    Contents,
    Listed,
    Member,
    Survey,
    examine,
    find,
    look,
)

SAY_EVERY_SECONDS = 5
BYTES_PER_PROCESS = 1 << 29  # what is read in about the time that a process takes to start
LISTED = 20  # lines of a kind
SHORT = 16  # characters of values that share a line
EXAMPLES = 4  # of an extension's shapes and values


class InspectConfig(Schema):
    verify: bool
    num_samples: int | None
    num_images: int
    out: str | None
    processes: int | None


def show(arguments: Sequence[str]) -> str:
    return configuration.dump(_load(arguments)[1])


def _load(arguments: Sequence[str]) -> tuple[list[str], dict]:
    """Shards, and the configuration."""
    keys = tuple(f"{name}=" for name in InspectConfig.model_fields)
    overrides = [a for a in arguments if a.startswith(keys)]
    config = configuration.load("inspect", overrides, InspectConfig)
    for name in ("num_samples", "processes"):
        if config[name] is not None and config[name] < 1:
            raise UserError(f"{name} must be positive, not {config[name]}")
    if config["num_images"] < 0:
        raise UserError(f"num_images must not be negative, and is {config['num_images']}")
    return [a for a in arguments if a not in overrides], config


def main(arguments: Sequence[str]) -> int:
    patterns, config = _load(arguments)
    if not patterns:
        raise UserError("say which shards: diffusion-trainer inspect 'shards/train-*.tar'")
    listed = list(dict.fromkeys(listed for pattern in patterns for listed in find(pattern)))
    contents = list(_examined(listed, config["verify"], config["processes"]))
    survey = look(contents, config["num_samples"], config["num_images"])
    _tell(contents, survey)
    if survey.pictures and config["out"] is not None:
        _draw(survey.pictures, Path(config["out"]))
    found = {(f.kind, f.shard, f.sample): f for f in (*(f for c in contents for f in c.found), *survey.found)}
    _tell_damage(list(found.values()), survey, config["verify"])
    return 2 if found else 0


def _examined(listed: Sequence[Listed], verify: bool, processes: int | None) -> Iterator[Contents]:
    """In their order, with a line now and then. processes: None takes those that the bytes to read are worth."""
    work = partial(examine, verify=verify)
    sizes = [one.path.stat().st_size for one in listed if (verify or one.shard is None) and one.path.is_file()]
    wanted = processes or min(cores(), sum(sizes) // BYTES_PER_PROCESS)
    if min(wanted, len(sizes)) < 2:
        yield from _with_progress(map(work, listed), len(listed))
        return
    with ProcessPoolExecutor(min(wanted, len(sizes)), mp_context=get_context("spawn")) as pool:
        try:
            yield from _with_progress(pool.map(work, listed), len(listed))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _with_progress(contents: Iterator[Contents], count: int) -> Iterator[Contents]:
    said = time.monotonic()
    for done, one in enumerate(contents, 1):
        if time.monotonic() - said >= SAY_EVERY_SECONDS:
            said = time.monotonic()
            print(f"  {done:,} of {count:,} shards", file=sys.stderr, flush=True)
        yield one


def _tell(contents: Sequence[Contents], survey: Survey) -> None:
    shards = [c.shard for c in contents]
    samples, size = sum(s.samples for s in shards), sum(s.size for s in shards)
    scanned = sum(c.scan is not None for c in contents)
    print(f"shards: {len(shards):,}" + (f", {scanned:,} of them without index" if scanned else ""))
    print(f"samples: {samples:,}, {_range([s.samples for s in shards])} a shard")
    print(f"bytes: {size:,}, {_range([s.size for s in shards])} a shard")
    if not survey.looked_at:
        print("there was no sample to look at")
        return
    print(f"fields, in the {survey.looked_at:,} samples looked at:")
    for extension, member in sorted(survey.members.items(), key=lambda item: (-len(item[1].sizes), item[0]))[:LISTED]:
        _tell_member(extension, member)
    if len(survey.members) > LISTED:
        print(f"  and {len(survey.members) - LISTED:,} other extensions")
    print(f"speed: {survey.looked_at / survey.seconds:,.0f} samples/s, read and decoded by one process here")


def _tell_member(extension: str, member: Member) -> None:
    print(f"  .{plain(extension)}: in {len(member.sizes):,}, {_range(member.sizes)} bytes")
    for shape, count in member.shapes.most_common(EXAMPLES):
        print(f"    {count:>8,}  {plain(shape)}")
    if len(member.shapes) > EXAMPLES:
        print(f"    and {len(member.shapes) - EXAMPLES:,} other shapes")
    values = [plain(value) for value, _ in member.values.most_common(EXAMPLES)]
    if values:
        between = ", " if max(map(len, values)) <= SHORT else "\n              "
        print(
            f"    {len(member.values):>8,}  different values, such as{between.replace(',', '')}{between.join(values)}"
        )


def _range(values: Sequence[int]) -> str:
    low, middle, high = min(values), median_low(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {middle:,})"


def _tell_damage(found: Sequence[Found], survey: Survey, verified: bool) -> None:
    if not found:
        where = "in any byte" if verified else f"in the {survey.looked_at:,} samples looked at; verify=true reads all"
        print(f"damage: none {where}")
        return
    print(f"damage: {len(found):,} found", file=sys.stderr)
    counts = Counter((f.kind, f.shard) for f in found)
    first = {(f.kind, f.shard): f for f in reversed(found)}
    for (kind, shard), count in counts.most_common(LISTED):
        example = first[kind, shard]
        where = "" if example.sample == WHOLE else f"sample {example.sample}: "
        print(f"  {count:>8,} {kind:<14} {plain(shard)}: {where}{plain(example.message)}", file=sys.stderr)
    if len(counts) > LISTED:
        print(f"  and in {len(counts) - LISTED:,} other shards", file=sys.stderr)


def _draw(images: Sequence[Image.Image], out: Path) -> None:
    """In cells of one size; small ones are enlarged by a whole number."""
    cell = max(max(image.size) for image in images)
    cells = np.stack([np.asarray(_centred(image, cell)) for image in images])
    columns = max(1, round(len(images) ** 0.5))
    grid = pictures.grid(torch.from_numpy(cells).permute(0, 3, 1, 2), columns, pictures.scale_for(cell))
    try:
        pictures.save(grid, out)
    except (OSError, ValueError) as error:  # the latter for a path without a name
        raise UserError(f"out={out} cannot be written ({error}); out=null draws none") from error
    print(f"picture: {out} shows {len(images):,} of them")


def _centred(image: Image.Image, cell: int) -> Image.Image:
    canvas = Image.new("RGB", (cell, cell))
    canvas.paste(image, ((cell - image.width) // 2, (cell - image.height) // 2))
    return canvas
