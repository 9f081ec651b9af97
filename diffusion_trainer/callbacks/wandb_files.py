"""What a run has told Weights & Biases, read from the records that it keeps in the run's folder, sent or not."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD = 32768, 7  # of LevelDB's log format: records in blocks; CRC-32C, length, type before each part
WHOLE, LAST = 1, 4  # types of a part that ends a record
Point = tuple[int, str]  # images seen, the metric's name


def points(folder: Path) -> set[Point]:
    """Of all processes of the run in `folder`."""
    found = set()
    for path in sorted((folder / "wandb").glob("*run-*/run-*.wandb")):
        for row in history(path):
            found |= set(points_of(row))
    return found


def points_of(row: Mapping[str, Any]) -> Iterator[Point]:
    """Without what Weights & Biases adds: _step, _runtime, _timestamp."""
    if "images_seen" in row:
        yield from ((row["images_seen"], key) for key in row if key != "images_seen" and not key.startswith("_"))


def history(path: Path) -> Iterator[dict]:
    """The rows of a .wandb file, as far as it goes: a process that was killed leaves a torn end."""
    for record in _records(path.read_bytes()):
        if record.WhichOneof("record_type") == "history":
            yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}


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
