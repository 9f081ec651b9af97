"""Bytes to numbers: npy and npz, without pickle.

Damage is all that these functions raise for bad data; the libraries' own exceptions are named where they are called.
"""

import io
import re
import zipfile
import zlib
from functools import lru_cache
from math import prod

import numpy as np

from diffusion_trainer.streaming.damage import MissingField, Refused, TooLarge, Undecodable, WrongShape
from diffusion_trainer.streaming.decoding import undecodable

MAX_HEADER = 10_000  # bytes of an npy before its numbers, as in numpy
MAX_DIMS = 32  # of an array
NPY = b"\x93NUMPY"
# The literal that every writer of npy makes; matched, as to evaluate it would need a list of all that can go wrong.
HEADER = re.compile(
    rb"\{'descr': (?P<descr>'[^']*'|\[.*\]), 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,18}, ?)*(?:\d{1,18})?)\),? ?\}\s*",
    re.DOTALL,
)
DESCR = re.compile(r"[<>|=](?:b1|[iu][1248]|f[248]|V2)")  # V2 may be bfloat16


def npy(data: memoryview) -> np.ndarray:
    """The array that an npy holds, as a view of the data; without pickle."""
    if len(data) < 12:
        raise undecodable("it is no npy", data)
    end = 10 + data[8] + 256 * data[9] if data[6] == 1 else 12 + int.from_bytes(data[8:12], "little")
    shape, dtype, order, size = _header(bytes(data[:end]))
    if len(data) - end != size:
        raise undecodable(f"{size} bytes of {dtype} {shape} should follow the npy header, not {len(data) - end}", data)
    return np.ndarray(shape, dtype, data, end, None, order)


@lru_cache(1024)  # a set of shards has few
def _header(head: bytes) -> tuple[tuple[int, ...], np.dtype, str, int]:
    """Shape, dtype, order, and bytes of the numbers, of an npy's bytes before them."""
    if head[:6] != NPY:
        what = "it is an npz: set `member` to the array's name" if head[:2] == b"PK" else "it is no npy"
        raise undecodable(what, memoryview(head))
    if len(head) > MAX_HEADER:
        raise undecodable(f"an npy header of {len(head)} bytes", memoryview(head))
    found = HEADER.fullmatch(head, 10 if head[6] == 1 else 12)
    if found is None:
        raise undecodable(f"the npy header is damaged: {head[10:90]!r}", memoryview(head))
    shape = tuple(int(n) for n in found["shape"].split(b",") if n.strip())
    if 0 in shape or len(shape) > MAX_DIMS:
        raise WrongShape(f"the npy holds an array of shape {shape}")
    dtype = _dtype(found["descr"].decode("latin-1").strip("'"))
    return shape, dtype, "F" if found["fortran"] == b"True" else "C", prod(shape) * dtype.itemsize


def _dtype(descr: str) -> np.dtype:
    if "O" in descr:
        raise Refused(f"the npy holds Python objects ({descr[:80]}): to read them is to run the code in them")
    if DESCR.fullmatch(descr) is None:
        raise WrongShape(f"the npy holds {descr[:80]!r}, neither integers nor floats")
    return np.dtype(descr)


def npz(data: memoryview, member: str, max_bytes: int) -> memoryview:
    """The npy of that name in an npz. TooLarge, before anything is inflated, if it has more numbers than that."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return memoryview(_inflated(archive, member, max_bytes))
    # zipfile raises ValueError for negative places, NotImplementedError for what it lacks, RuntimeError for encryption.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise undecodable(f"it is no npz ({error})", data) from error
    except (NotImplementedError, RuntimeError) as error:
        raise undecodable(f"its {member} cannot be read ({error})", data) from error


def _inflated(archive: zipfile.ZipFile, member: str, max_bytes: int) -> bytes:
    found = [info for info in archive.infolist() if info.filename == f"{member}.npy"]
    if not found:
        names = ", ".join(archive.namelist()[:8])
        raise MissingField(f"its npz has no {member}, only {names or 'nothing'}")
    info = found[-1]
    if info.file_size > max_bytes + MAX_HEADER:
        raise TooLarge(f"{member} of its npz has {info.file_size} bytes, the configuration's array {max_bytes}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Undecodable(f"{member} of its npz is compressed by method {info.compress_type}, not by deflate")
    with archive.open(info) as file:
        return file.read(max_bytes + MAX_HEADER)
