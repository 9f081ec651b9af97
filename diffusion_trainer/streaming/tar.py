"""The members of a tar, from its bytes alone: POSIX ustar and pax, GNU long names, old-style headers.

Python's tarfile reads files from their start; samples are read from the middle, and a hundred thousand times a second.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from diffusion_trainer.streaming.damage import BadArchive, TooLarge, Truncated

BLOCK = 512
MAX_DIGITS = 19
MAX_HEADER = 1 << 20  # bytes of an extended header: who writes one may be a stranger, and it is read at once
REGULAR = b"0\x007"  # type flags of files (0, old-style NUL, contiguous)
NO_DATA = b"123456"  # links, devices, folders, pipes: whatever size they tell, nothing follows
EXTENDED = b"Lx"  # GNU's long name, or pax records, of the header that follows
COMMON = b"gK"  # pax records for all, a link's long target: they say nothing of one member's name
SPARSE = b"S"  # GNU's old way for files with holes; in pax headers they are records
SPARSE_RECORDS = b"GNU.sparse."
_RECORD = re.compile(rb"(\d{1,%d}) ([^=]*)=" % MAX_DIGITS)  # how one of pax begins: its length and key
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/]*__(/|\Z)")  # webdataset's


class Bytes(Protocol):
    """What `members` reads: bytes, a memoryview, or a file that looks like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, piece: slice) -> bytes | memoryview: ...


class Member(NamedTuple):
    start: int  # of its first header (a long name comes before the header proper)
    name: str
    offset: int  # of its data
    size: int

    @property
    def end(self) -> int:
        return self.offset + padded(self.size)


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def key_and_extension(name: str) -> tuple[str, str] | None:
    """The sample a member belongs to and its extension, lower case, from the base name's first dot on, as webdataset
    splits them; None for members that belong to none (`.hidden`, `__meta__.json`, names without a dot)."""
    found = _KEY.fullmatch(name)
    if found is None or _META.match(name) or found[1].rpartition("/")[2].startswith("__"):
        return None
    return found[1], found[2].lower()


def members(data: Bytes, checked: bool = False) -> Iterator[Member]:
    """The regular files among the `entries`."""
    return (member for member, regular in entries(data, checked) if regular)


def entries(data: Bytes, checked: bool = False) -> Iterator[tuple[Member, bool]]:
    """All that has a header in a tar, or in a piece of one that starts at a header; an empty block or the data end it.

    With each, whether it is a file (not a folder, a link, or a header of headers). Long names and sizes of extended
    headers are those of the entry that follows. checked: the headers' checksums, too. It takes no more than MAX_HEADER
    bytes at once. Raises BadArchive for what is no header, TooLarge for a larger one, Truncated for an entry that does
    not end within the data.
    """
    at, end, long = 0, len(data), _Long()
    while at + BLOCK <= end:
        header = bytes(data[at : at + BLOCK])
        if len(header) < BLOCK:
            raise Truncated(f"it became shorter than {end} bytes while it was read")
        if not header[0] and not any(header):
            return
        if checked:
            _check(header, at)
        kind = header[156:157]
        if kind == SPARSE:
            raise _sparse(at)
        told = _number(header[124:136], at) if long.size is None else long.size
        size, offset = 0 if kind in NO_DATA else told, at + BLOCK
        if offset + size > end:
            raise Truncated(f"a member of {size} bytes at byte {offset} ends beyond byte {end}")
        if kind in EXTENDED:
            if size > MAX_HEADER:
                raise TooLarge(f"an extended header at byte {at} has {size} bytes, more than {MAX_HEADER}")
            long = long.read(kind, bytes(data[offset : offset + size]), offset)
            long = long._replace(start=at if long.start is None else long.start)
            yield Member(at, "", offset, size), False
        else:
            start, name = at if long.start is None else long.start, _name(header) if long.name is None else long.name
            folder = kind == b"\0" and name.endswith("/")  # as it was written before there were type flags
            yield Member(start, name, offset, size), kind in REGULAR and not folder
            if kind not in COMMON:
                long = _Long()
        at = offset + padded(size)


def is_tar(head: bytes) -> bool:
    """Whether what begins so, as far as it came, is a tar: a header with its checksum, or the end mark of an empty one.

    What proxies and stores say instead of a tar is none, and a member's name may be any of it.
    """
    if len(head) < BLOCK:
        return False
    try:
        _check(head[:BLOCK], 0)
    except BadArchive:
        return not any(head[:BLOCK])
    return True


class _Long(NamedTuple):
    """What extended headers say of the next member, and where the first of them is."""

    name: str | None = None
    size: int | None = None
    start: int | None = None

    def read(self, kind: bytes, body: bytes, at: int) -> "_Long":
        if kind == b"L":
            return self._replace(name=_text(body))
        records = _pax(body, at)
        if any(key.startswith(SPARSE_RECORDS) for key in records):
            raise _sparse(at)
        return self._replace(
            name=_text(records[b"path"]) if b"path" in records else self.name,
            size=_decimal(records[b"size"], at) if b"size" in records else self.size,
        )


def _pax(body: bytes, at: int) -> dict[bytes, bytes]:
    """Records "<length> <key>=<value>\\n"; the length counts all of it, so that values may hold newlines."""
    records, place, end = {}, 0, len(body.rstrip(b"\0"))
    while place < end:  # by position: what is left, copied for each record, would be quadratic
        found = _RECORD.match(body, place)
        size = int(found[1]) if found else 0
        if found is None or not found.end() < place + size <= len(body):
            raise BadArchive(f"a pax header at byte {at} cannot be read")
        records[found[2]] = body[found.end() : place + size - 1]
        place += size
    return records


def _sparse(at: int) -> BadArchive:
    """What follows is a map of the file's holes and what lies between them: as a file it would be other bytes."""
    return BadArchive(f"the member at byte {at} is stored as a sparse file; write the tar without --sparse (-S)")


def _decimal(digits: bytes, at: int) -> int:
    if not digits.isdigit() or len(digits) > MAX_DIGITS:
        raise BadArchive(f"a pax header at byte {at} has {digits[:20]!r} where a number should be")
    return int(digits)


def _number(field: bytes, at: int) -> int:
    """Octal digits, or GNU's base 256 for large files."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise BadArchive(f"byte {at} is no tar header")
    return int(digits or b"0", 8)


def _check(header: bytes, at: int) -> None:
    rest = header[:148] + header[156:]
    unsigned = sum(rest) + 8 * 32
    signed = unsigned - 256 * sum(byte > 127 for byte in rest)  # what some old programs summed
    if _number(header[148:156], at) not in (unsigned, signed):
        raise BadArchive(f"the tar header at byte {at} has a wrong checksum")


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode(errors="backslashreplace")


def _name(header: bytes) -> str:
    name = _text(header[:100].partition(b"\0")[0])
    if header[257:263] == b"ustar\0" and header[345]:  # POSIX splits names of over 100 bytes
        return f"{_text(header[345:500].partition(bytes(1))[0])}/{name}"
    return name
