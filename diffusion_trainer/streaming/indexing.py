"""Makes the index of shards on disks, in parallel."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from diffusion_trainer.streaming.decoding import IMAGES, image_size
from diffusion_trainer.streaming.index import (
    CHECKSUMS,
    INDEX,
    OFFSETS,
    SIZES,
    Scan,
    Shard,
    read_index,
    scan,
    write_index,
    write_sidecars,
    write_sizes,
)
from diffusion_trainer.streaming.tar import Cutter

SAVE_EVERY = 1000  # shards: what an interruption may cost


@dataclass
class Report:
    """What was found in the shards."""

    shards: list[Shard] = field(default_factory=list)  # in the index now
    known: int = 0  # of them, that were in it before
    fields: Counter[tuple[str, ...]] = field(default_factory=Counter)  # extensions -> samples, of those scanned
    damaged: dict[Path, str] = field(default_factory=dict)  # why, and how many samples are whole


def index(
    paths: Sequence[Path],
    processes: int,
    again: bool = False,
    keep_damaged: bool = False,
    image_sizes: bool = False,
    progress: Callable[[int, int], None] = lambda shards, size: None,
) -> Report:
    """Scans the shards that have no index (again: all of them) and writes it next to them.

    A damaged shard is left out of the index; keep_damaged: its whole samples are in it. image_sizes: what buckets
    need, too. progress(shards, bytes so far).
    """
    report = Report()
    todo = []
    for folder, here in _by_folder(paths).items():
        listed = {s.url: s for s in read_index(folder / INDEX)} if (folder / INDEX).is_file() else {}
        for path in here:
            entry = listed.get(path.name)
            if entry is None or again or not _is_indexed(path, entry, image_sizes):
                todo.append(path)
            else:
                report.shards.append(entry)
    report.known = len(report.shards)
    found: list[tuple[Path, Shard]] = []
    size = 0
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            jobs = {pool.submit(_scan, path, keep_damaged, image_sizes): path for path in todo}
            for done, job in enumerate(as_completed(jobs), 1):
                path, (shard, fields, damage) = jobs[job], job.result()
                size += shard.size
                if damage is not None:
                    report.damaged[path] = f"{damage}; {shard.samples} whole samples before it"
                if damage is None or keep_damaged:
                    found.append((path, shard))
                    report.fields.update(fields)
                if len(found) >= SAVE_EVERY:
                    _save(found, report)
                progress(done, size)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            _save(found, report)
    return report


def _save(found: list[tuple[Path, Shard]], report: Report) -> None:
    for folder, here in _by_folder([path for path, _ in found]).items():
        write_index(folder, [shard for path, shard in found if path in set(here)])
    report.shards += [shard for _, shard in found]
    found.clear()


def _by_folder(paths: Sequence[Path]) -> dict[Path, list[Path]]:
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    return folders


def _is_indexed(path: Path, entry: Shard, image_sizes: bool) -> bool:
    suffixes = (OFFSETS, CHECKSUMS, SIZES) if image_sizes else (OFFSETS, CHECKSUMS)
    beside = [Path(f"{path}{suffix}") for suffix in suffixes]
    return path.stat().st_size == entry.size and all(sidecar.is_file() for sidecar in beside)


def _scan(path: Path, keep_damaged: bool, image_sizes: bool) -> tuple[Shard, Counter, str | None]:
    found: Scan = scan(path)
    if found.damage is None or keep_damaged:
        write_sidecars(path, found)
        if image_sizes:
            write_sizes(path, _sizes(path, found))
    return found.shard(path.name), Counter(found.fields), str(found.damage) if found.damage else None


def _sizes(path: Path, found: Scan) -> np.ndarray:
    """(n, 2) height and width of each sample's image, from its header; 0 where there is none."""
    sizes = np.zeros((len(found.checksums), 2), "<u4")
    cut = Cutter()
    with path.open("rb") as file:
        for row, (first, last) in enumerate(pairwise(found.offsets.tolist())):
            file.seek(first)
            members = cut(memoryview(file.read(last - first)))
            sizes[row] = next((image_size(members[e]) for e in IMAGES if e in members), (0, 0))
    return sizes
