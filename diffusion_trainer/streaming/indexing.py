"""Makes the index of shards, in parallel."""

import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from diffusion_trainer.conventions import cores
from diffusion_trainer.streaming.cutter import Cutter
from diffusion_trainer.streaming.decoding import IMAGES, image_size
from diffusion_trainer.streaming.index import CHECKSUMS, OFFSETS, SIZES, Shard
from diffusion_trainer.streaming.scanning import Scan, scan
from diffusion_trainer.streaming.sites import LocalSite, Site
from diffusion_trainer.streaming.writing import end_with_parent

SAVE_EVERY = 1000  # shards: what an interruption may cost
BYTES_PER_PROCESS = 1 << 29  # what is read in about the time that a process takes to start (it imports torch)
AT_ONCE = 16  # questions to a store

Result = tuple[Shard, Counter[tuple[str, ...]], str | None]  # of a scan: fields, and what is damaged


@dataclass
class Report:
    """What was found in the shards."""

    shards: list[Shard] = field(default_factory=list)  # in the index now
    known: int = 0  # of them, that were in it before
    fields: Counter[tuple[str, ...]] = field(default_factory=Counter)  # extensions -> samples, of those scanned
    damaged: dict[str, str] = field(default_factory=dict)  # why, and how many samples are whole


def index(
    places: Sequence[Path | Site],
    processes: int | None,
    again: bool = False,
    keep_damaged: bool = False,
    image_sizes: bool = False,
    progress: Callable[[int, int], None] = lambda shards, size: None,
) -> Report:
    """Scans the shards that have no index (again: all of them) and writes it beside them.

    processes: None takes those that the bytes to read are worth; one is this one. A damaged shard is left out of the
    index; keep_damaged: its whole samples are in it. image_sizes: what buckets need, too. progress(shards, bytes so
    far).
    """
    sites = [LocalSite(place) if isinstance(place, Path) else place for place in places]
    report, size = Report(), 0
    for here in _by_folder(sites).values():
        here[0].clean()
        if again:
            here[0].begin_anew()
    todo = sites if again else _without_index(sites, image_sizes, report)
    found: list[tuple[Site, Shard | None]] = []  # None: it is not to be in the index
    work = partial(_scan, keep_damaged=keep_damaged, image_sizes=image_sizes)
    try:
        with closing(_scanned(todo, work, min(processes or _worth(todo), len(todo)))) as scanned:
            for done, (site, (shard, fields, damage)) in enumerate(scanned, 1):
                size += shard.size
                if damage is not None:
                    report.damaged[str(site)] = f"{damage}; {shard.samples} whole samples before it"
                kept = damage is None or keep_damaged
                found.append((site, shard if kept else None))
                if kept:
                    report.fields.update(fields)
                if len(found) >= SAVE_EVERY:
                    _save(found, report)
                progress(done, size)
    finally:
        _save(found, report)
    return report


def _worth(todo: Sequence[Site]) -> int:
    """How many processes. A store's shards are worth one each: they wait for the network."""
    size = sum(site.size() for site in todo if isinstance(site, LocalSite))
    remote = sum(not isinstance(site, LocalSite) for site in todo)
    return max(1, min(cores(), remote + size // BYTES_PER_PROCESS))


def _scanned(
    todo: Sequence[Site], work: Callable[[Site], Result], processes: int
) -> Generator[tuple[Site, Result], None, None]:
    """As they are done."""
    if processes < 2:
        yield from ((site, work(site)) for site in todo)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin) as pool:
        try:
            jobs = {pool.submit(work, site): site for site in todo}
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _without_index(sites: Sequence[Site], image_sizes: bool, report: Report) -> list[Site]:
    """The others are in the report, as known."""
    suffixes = (OFFSETS, CHECKSUMS, SIZES) if image_sizes else (OFFSETS, CHECKSUMS)
    todo, known = [], partial(_is_known, image_sizes=image_sizes, suffixes=suffixes)
    with ThreadPoolExecutor(AT_ONCE) as pool:  # one by one, a store's hundred thousand shards would take hours
        for here in _by_folder(sites).values():
            entries = {shard.url: shard for shard in here[0].listed()}
            listed = [entries.get(site.name) for site in here]
            answers = (map if isinstance(here[0], LocalSite) else pool.map)(known, here, listed)
            for site, entry, is_known in zip(here, listed, answers, strict=True):
                if is_known:
                    report.shards.append(entry)
                else:
                    todo.append(site)
    report.known = len(report.shards)
    return todo


def _is_known(site: Site, entry: Shard | None, image_sizes: bool, suffixes: Sequence[str]) -> bool:
    lacks_sizes = image_sizes and entry is not None and entry.sizes is None
    return entry is not None and not lacks_sizes and site.is_indexed(entry.size, suffixes)


def _save(found: list[tuple[Site, Shard | None]], report: Report) -> None:
    shards = {str(site): shard for site, shard in found}
    for here in _by_folder([site for site, _ in found]).values():
        kept = [shard for site in here if (shard := shards[str(site)]) is not None]
        here[0].list(kept, without={site.name for site in here if shards[str(site)] is None})
        report.shards += kept
    found.clear()


def _begin() -> None:
    """Of a process of the pool: Ctrl-C is the parent's to handle, and none outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _by_folder(sites: Sequence[Site]) -> dict[str, list[Site]]:
    folders: dict[str, list[Site]] = {}
    for site in sites:
        folders.setdefault(site.folder, []).append(site)
    return folders


def _scan(site: Site, keep_damaged: bool, image_sizes: bool) -> Result:
    with site.local() as path:
        found = scan(path)
        if found.damage is None or keep_damaged:
            found = found._replace(sizes=_sizes(path, found) if image_sizes else None)
            for suffix, data in found.sidecars().items():
                site.put(f"{site.name}{suffix}", data)
            if not image_sizes:
                site.remove(f"{site.name}{SIZES}")
    return found.shard(site.name), Counter(found.fields), str(found.damage) if found.damage else None


def _sizes(path: Path, found: Scan) -> np.ndarray:
    """(n, 2) height and width of each sample's image, from its header; 0 where there is none."""
    sizes = np.zeros((len(found.checksums), 2), "<u4")
    if not len(sizes):
        return sizes
    cut, data = Cutter(), memoryview(np.memmap(path, mode="r"))  # a sample may be larger than the memory
    for row, (first, last) in enumerate(pairwise(found.offsets.tolist())):
        members = cut(data[first:last])
        sizes[row] = next((image_size(members[e]) for e in IMAGES if e in members), (0, 0))
    return sizes
