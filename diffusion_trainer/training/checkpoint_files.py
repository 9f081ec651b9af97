"""The two kinds of files in a checkpoint, each with a checksum: tensors (the format of safetensors' README) and JSON.

Checksums are CRC-32: they find damage (any one flipped bit, any burst of 32), files that changed places and files of
another run. They prove nothing about who wrote a file; that nothing in it can run code does not rest on them.
Nothing goes through $TMPDIR: a file is written in the folder that it stays in.
"""

import errno
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from isal import isal_zlib
from torch import Tensor

from diffusion_trainer.conventions import PassingError, UserError

FORMAT = 2
MANIFEST = "manifest.json"
TENSORS = re.compile(r"rank-\d{5,}\.safetensors")  # the only names that a manifest may give to files
CHUNK = 1 << 22  # bytes: small enough to be in the processor's cache still when they are written
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written: `problem` names the file, the message also says what to do."""

    def __init__(self, path: Path, problem: str):
        self.problem = f"checkpoint file {path} is damaged: {problem}"
        super().__init__(f"{self.problem}. Remove that checkpoint's folder, or name another, to use the one before it")


PASSING = {  # what says nothing about the file; EIO does: it is what a disk says of a sector that it cannot read
    getattr(errno, name)
    for name in (
        *("ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "ENOMEM", "EMFILE", "ENFILE", "EBUSY", "EACCES", "EPERM"),
        *("ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ECONNRESET", "ECONNREFUSED"),
        *("ESHUTDOWN", "EREMOTEIO", "EKEYEXPIRED"),
    )
}


def unreadable(path: Path, error: Exception) -> UserError:
    """What to raise where a file of a checkpoint cannot be read: it is damaged, or it is not the file that is ill (a
    file system does not answer, this process may not read it, memory is short).
    """
    if not isinstance(error, OSError) or error.errno in PASSING:
        return PassingError(f"checkpoint file {path} cannot be read now: {error}. Try again: it may be whole")
    return DamagedCheckpoint(path, str(error))


Layout = tuple[torch.dtype, Sequence[int]]  # of a tensor: dtype, shape


class Written(NamedTuple):
    """What a file must be."""

    size: int  # bytes
    crc32: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Writes CPU tensors, waits until they are on the disk and reads them back from there; OSError if either fails."""
    crc32 = 0
    with path.open("xb") as file:
        head = header({name: (t.dtype, t.shape) for name, t in tensors.items()})
        for data in (memoryview(head), *map(_bytes, tensors.values())):
            for at in range(0, len(data), CHUNK):
                crc32 = isal_zlib.crc32(data[at : at + CHUNK], crc32)
                file.write(data[at : at + CHUNK])
        written = Written(file.tell(), crc32)
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "linux":  # so that it is the disk that is read
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if read_back(path) != written:
        raise OSError(f"{path} is not what was written to it")
    return written


def read_back(path: Path) -> Written:
    size, crc32, buffer = 0, 0, memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            size, crc32 = size + count, isal_zlib.crc32(buffer[:count], crc32)
    return Written(size, crc32)


def header(tensors: Mapping[str, Layout], metadata: Mapping[str, str] | None = None) -> bytes:
    """All that stands before the numbers: length (8 bytes), then metadata and each tensor's dtype, shape and place as
    JSON, with spaces to a multiple of 8 bytes, so that a reader may map them. ValueError for dtypes not in DTYPES.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in DTYPES:
            raise ValueError(f"{dtype} cannot be written; {', '.join(map(str, DTYPES))} can")
        end = at + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """`manifest` and a checksum of it, JSON."""
    write_text(folder / MANIFEST, sealed(manifest))


def sealed(manifest: Mapping[str, Any]) -> str:
    """The text of manifest.json. ValueError or TypeError if it cannot be said in JSON."""
    content = json.loads(json.dumps(manifest))
    return json.dumps({**content, "crc32": _crc32_of(content)}, indent=1)


def _crc32_of(content: Mapping[str, Any]) -> int:
    return isal_zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Checked; its `files` are {name: Written}. DamagedCheckpoint, or UserError for another version's."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        _check(isinstance(manifest, dict) and _is_count(manifest.get("format")), "it says no format")
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']}; this version reads {FORMAT}")
        if manifest.pop("crc32", None) != _crc32_of(manifest):
            raise ValueError("its checksum is not that of its content")
        return _checked(manifest)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(path, _say(error)) from error


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}, {error}" if isinstance(error, KeyError | RecursionError) else str(error)


def _checked(manifest: dict[str, Any]) -> dict[str, Any]:
    """A checksum can be made for anything: whatever is used as a number, a name or a size must be one."""
    wrong = [key for key in ("state", "files", "parameters") if not isinstance(manifest[key], dict)]
    _check(not wrong, f"{wrong[:1]} is no object")
    _check(_is_count(manifest["images_seen"]), "images_seen is no number of images")
    steps = manifest["optimizer_steps"]
    _check(type(steps) in (int, float) and 0 <= steps < math.inf, "optimizer_steps is no number of steps")
    files = {name: Written(f["size"], f["crc32"]) for name, f in manifest["files"].items()}
    wrong = [name for name in files if not TENSORS.fullmatch(name)]
    _check(not wrong, f"it names the file {wrong[:1]}, which is none of a checkpoint")
    _check(all(map(_is_count, chain(*files.values()))), "a size or checksum is none")
    shapes = manifest["parameters"].values()
    _check(all(isinstance(shape, list) and all(map(_is_count, shape)) for shape in shapes), "a shape is none")
    numbers = sum(math.prod(shape) for shape in shapes)
    _check(numbers <= sum(f.size for f in files.values()), "its parameters are larger than its files")
    return {**manifest, "files": files}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def write_text(path: Path, text: str) -> None:
    """A small file that appears complete or not at all, and is on the disk then."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    sync(part)
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; OSError if they cannot be brought there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
