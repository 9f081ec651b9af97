"""Samples cut into members without reading their headers one by one: nearly all are as writers of today make them."""

import re
from collections.abc import Mapping
from functools import lru_cache

from diffusion_trainer.streaming.tar import BLOCK, entries, key_and_extension, padded

MAX_LAYOUTS = 4  # of samples of one size: labels of 1, 2 and 3 digits are padded to the same
MAX_MEMBERS = 64  # of a sample whose layout is learnt: an expression for thousands takes seconds and hundreds of MB
MAX_SIZES = 1024  # of samples
Places = Mapping[str, tuple[int, int]]  # extension -> where in the sample the member's data begin and end

# A header that says all about its member: the name, ASCII, ends in its field and belongs to a sample, the type is that
# of files today, and the name has no first part elsewhere (POSIX's prefix).
_NAMED = rb"(?!__)(?=[\x01-\x7f]{1,99}\0)(?=(?:[^\0]*/)?(?!__)[^\0/.]+\.%b\0).{124}"
_REST = rb".{20}0.{100}(?!ustar\0.{82}[^\0])"
_PLAIN = re.compile(_NAMED % rb"([^\0/]+)" + rb"([0-7]{11})[\0 ]" + _REST, re.DOTALL)


class Cutter:
    """Cuts samples into members, and remembers how: samples of latents differ in nothing but their data."""

    def __init__(self):
        self._known: dict[int, list[_Layout]] = {}  # by the size of the sample, the last that fitted first
        self._last: dict[int, Places] = {}  # of each size

    def __call__(self, data: memoryview) -> dict[str, memoryview]:
        """Extension -> bytes of the members of one sample."""
        return {extension: data[start:end] for extension, (start, end) in self.places(data).items()}

    def places(self, data: memoryview) -> Places:
        """Of the members of one sample. Damage if it cannot be cut."""
        known = self._known.get(len(data), ())
        for k, layout in enumerate(known):
            if layout.match(data):
                if k:
                    known.insert(0, known.pop(k))
                return layout.places
        found = _plain(data)
        if found is None:
            return _by_headers(data)
        self._learn(found, data)
        return found

    def _learn(self, found: Places, data: memoryview) -> None:
        """A layout costs 20 cuts: it is made of the second of two samples that lie alike."""
        size = len(data)
        known = self._known.get(size, [])
        if self._last.get(size) != found:
            if len(self._last) < MAX_SIZES or size in self._last:
                self._last[size] = found
        elif len(known) < MAX_LAYOUTS and len(found) <= MAX_MEMBERS:
            self._known[size] = [_Layout(found, data), *known]


class _Layout:
    """Where the members of some samples of one size lie, and what their headers say then, whatever the keys."""

    def __init__(self, places: Places, data: memoryview):
        self.places = places
        patterns = [_pattern(extension, *place, data) for extension, place in places.items()]
        self.match = re.compile(b"".join(patterns), re.DOTALL).match


def _pattern(extension: str, start: int, end: int, data: memoryview) -> bytes:
    """Of a plain member's header and all that follows up to the next one's."""
    size = re.escape(bytes(data[start - BLOCK + 124 : start - BLOCK + 136]))
    rest = BLOCK - 257 + padded(end - start)
    return _NAMED % (b"(?i:%b)" % re.escape(extension.encode())) + size + _REST + rb".{%d}" % rest


def _plain(data: memoryview) -> Places | None:
    """None if it is not made of plain members alone."""
    found, at, end = {}, 0, len(data)
    while at < end:
        header = _PLAIN.match(data, at)
        if header is None:
            return None
        extension, size = _text(header[1]), int(header[2], 8)
        if extension in found:
            return None
        found[extension] = at + BLOCK, at + BLOCK + size
        at += BLOCK + padded(size)
    return found if at == end else None


@lru_cache(1024)
def _text(extension: bytes) -> str:
    return extension.decode("ascii").lower()


def _by_headers(data: memoryview) -> Places:
    named = ((key_and_extension(m.name), m) for m, regular in entries(data) if regular)
    return {name[1]: (m.offset, m.offset + m.size) for name, m in named if name is not None}
