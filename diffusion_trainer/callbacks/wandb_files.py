"""What a run has told Weights & Biases, read from the records that it keeps in the run's folder, sent or not."""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD = 32768, 7  # of LevelDB's log format: records in blocks; checksum, length, type before each part
WHOLE, LAST = 1, 4  # types of a part that ends a record
Point = tuple[int, str]  # images seen, the metric's name


def records(folder: Path) -> list[Path]:
    """One of each session of the run in `folder`, in the order of their starts."""
    return sorted((folder / "wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.parent.name.split("run-", 1)[1])


def points(folder: Path) -> set[Point]:
    """Of all sessions, whether sent or not."""
    return {point for path in records(folder) for row in history(path) for point in points_of(row)}


def received(folder: Path, next_step: int) -> tuple[set[Point], int]:
    """What the server has of them, if it counts the next row that it gets as its row `next_step`; and the first of its
    rows that no record has (`next_step`: there is none): the power was cut, or somebody has removed a session.

    Only a session that has talked to the server has a number to start at (also `wandb sync` of one that was offline
    gives it one). What the server had not got by the start of a session, it has never got.
    """
    rows: dict[int, dict] = {}
    for start, path in sorted(_starts(folder), key=lambda item: (item[0], _asked(item[1]).stat().st_mtime)):
        rows = {at: row for at, row in rows.items() if at < start} | dict(enumerate(history(path), start))
    unknown = next((at for at in range(next_step) if at not in rows), next_step)
    return {point for at, row in rows.items() if at < next_step for point in points_of(row)}, unknown


def _starts(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in records(folder):
        with suppress(FileNotFoundError, ValueError):  # it has not asked, or was killed while it wrote down the answer
            yield json.loads(_asked(path).read_text()).get("starting_step", 0), path


def _asked(path: Path) -> Path:
    """Where wandb-core keeps what it was told by the server at the start of the session."""
    return path.with_name(f"{path.name}.syncstate")


def identity(folder: Path) -> dict[str, Any]:
    """What wandb.init was told of the run beyond its name, by the environment of the last session that was told so: the
    group that a sweep gives it, its tags. Keys are wandb.init's.
    """
    told: dict[str, Any] = {}
    for path in records(folder):
        run = next((r.run for r in _records(path.read_bytes()) if r.WhichOneof("record_type") == "run"), None)
        if run is not None:
            said = {"group": run.run_group, "job_type": run.job_type, "tags": [*run.tags], "notes": run.notes}
            told |= {key: value for key, value in said.items() if value}
    return told


def leave_out(paths: Iterable[Path]) -> None:
    """So that `wandb sync` does not send them: another session has sent, or will send, what is in them."""
    for path in paths:
        path.with_name(f"{path.name}.synced").touch()


def points_of(row: Mapping[str, Any]) -> Iterator[Point]:
    """Without what Weights & Biases adds: _step, _runtime, _timestamp."""
    if "images_seen" in row:
        yield from ((row["images_seen"], key) for key in row if key != "images_seen" and not key.startswith("_"))


def history(path: Path) -> Iterator[dict]:
    """The rows of a .wandb file, as far as it goes: a process that was killed leaves a torn end."""
    for record in _records(path.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                if inner:  # of a picture: its path, its size
                    row.setdefault(name, {})["/".join(inner)] = json.loads(item.value_json)
                else:
                    row[name] = json.loads(item.value_json)
            yield row


def _records(data: bytes) -> Iterator[Record]:
    at, parts = HEAD, b""  # after the file's own head
    while at + HEAD <= len(data):
        left = BLOCK - at % BLOCK
        _, length, kind = struct.unpack("<IHB", data[at : at + HEAD]) if left >= HEAD else (0, 0, 0)
        if not kind:  # what is left of a block is filled with zeros
            at += left
            continue
        if at + HEAD + length > len(data):
            return
        parts += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (WHOLE, LAST):
            try:
                yield Record.FromString(parts)
            except DecodeError:
                return  # bytes that a power cut left: nothing after them can be trusted
            parts = b""
