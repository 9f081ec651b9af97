"""diffusion-trainer index: counts, offsets and checksums of shards, next to them."""

import glob
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from diffusion_trainer.apps import config as configuration
from diffusion_trainer.apps.nodes import Schema
from diffusion_trainer.callbacks.redaction import filled
from diffusion_trainer.conventions import UserError, plain
from diffusion_trainer.streaming.index import CHECKSUMS, INDEX, OFFSETS, SIZES
from diffusion_trainer.streaming.indexing import Report, index
from diffusion_trainer.streaming.remote import Gone, Remote, globbed
from diffusion_trainer.streaming.retries import Retries
from diffusion_trainer.streaming.sites import RemoteSite, Site
from diffusion_trainer.streaming.urls import expanded, is_pipe, is_url

SAY_EVERY_SECONDS = 5
BESIDE = (OFFSETS, CHECKSUMS, SIZES)  # what an index has made
ASK = "say which shards: diffusion-trainer index 'shards/train-*.tar'"


class IndexConfig(Schema):
    processes: int | None
    again: bool
    image_sizes: bool
    out: str | None
    timeout_seconds: float
    retries: int
    storage_options: dict
    keep_damaged: bool


def show(arguments: Sequence[str]) -> str:
    return configuration.dump(_load(arguments)[1])


def _load(arguments: Sequence[str]) -> tuple[list[str], dict]:
    """Shards, and the configuration."""
    keys = tuple(f"{name}=" for name in IndexConfig.model_fields)
    overrides = [a for a in arguments if a.startswith(keys)]
    config = configuration.load("index", overrides, IndexConfig)
    if config["processes"] is not None and config["processes"] < 1:
        raise UserError(f"processes must be positive, not {config['processes']}")
    return [a for a in arguments if a not in overrides], config


def files(patterns: Sequence[str]) -> list[Path]:
    """The tars that paths, globs and braces name; of a folder, all in it. UserError if one names none."""
    if not patterns:
        raise UserError(ASK)
    found: dict[Path, None] = {}
    for pattern in patterns:
        for name in expanded(pattern):
            name = f"{name.rstrip('/')}/*.tar" if Path(name).is_dir() else name
            there = (Path(p) for p in sorted(glob.glob(name, recursive=True)))
            matching = [p for p in there if p.is_file() and p.name != INDEX and p.suffix not in BESIDE]
            if not matching:
                raise UserError(f"no file matches {name} (looked in {Path(name).absolute().parent})")
            found |= dict.fromkeys(matching)
    return list(found)


def sites(patterns: Sequence[str], config: dict) -> list[Path | Site]:
    """The shards that paths, URLs, globs and braces name; UserError if one names none."""
    try:
        remote = Remote(config["timeout_seconds"], filled(config["storage_options"]))
        retries = Retries(config["retries"], 0.5)
    except ValueError as error:
        raise UserError(str(error)) from error
    out = Path(config["out"]) if config["out"] else None
    found: list[Path | Site] = []
    for pattern in patterns:
        if not is_url(pattern):
            if out is not None:
                raise UserError(f"out={out} is for shards at URLs; the index of {pattern} stands beside it")
            found += files([pattern])
            continue
        if is_pipe(pattern):
            raise UserError(f"{pattern}: the output of a command has no place for an index; give a path or a URL")
        for url in expanded(pattern):
            urls = globbed(remote, retries, url) if "*" in url else [url]
            found += [RemoteSite(each, remote, retries, out) for each in urls]
            if not urls:
                raise UserError(f"no object matches {url}")
    return list({str(one): one for one in found}.values())


def main(arguments: Sequence[str]) -> int:
    patterns, config = _load(arguments)
    if not patterns:
        raise UserError(ASK)
    paths = sites(patterns, config)
    begin = said = time.monotonic()

    def progress(done: int, size: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SAY_EVERY_SECONDS:
            said = now
            print(f"  {done:,} shards, {size / 1e9:,.1f} GB, {size / 1e6 / (now - begin):,.0f} MB/s", flush=True)

    again, keep_damaged, image_sizes = (config[name] for name in ("again", "keep_damaged", "image_sizes"))
    try:
        report = index(paths, config["processes"], again, keep_damaged, image_sizes, progress)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that indexes was killed (out of memory?); what was done stands: run the same command again"
        ) from error
    except Gone as error:
        raise UserError(f"there is no such shard ({error}); what was done stands") from error
    except OSError as error:
        raise UserError(f"cannot index ({error}); what was done stands: run the same command again") from error
    return _tell(report, keep_damaged)


def _tell(report: Report, kept: bool) -> int:
    samples = sum(shard.samples for shard in report.shards)
    size = sum(shard.size for shard in report.shards)
    before = f", {report.known:,} of them indexed before" if report.known else ""
    print(f"index: {len(report.shards):,} shards{before}, {samples:,} samples, {size / 1e9:,.3f} GB")
    for extensions, count in report.fields.most_common():
        print(f"  {count:>12,} samples with {', '.join(f'.{plain(e)}' for e in extensions)}")
    for path, why in sorted(report.damaged.items()):
        print(f"  damaged: {plain(path)}: {why}", file=sys.stderr)
    if report.damaged and not kept:
        print(
            f"error: {len(report.damaged)} damaged shards are not in the index; write or copy them again, or index "
            "what is whole of them: keep_damaged=true",
            file=sys.stderr,
        )
        return 2
    return 0
