"""JPEGs whose scans would cost more than their bytes: each may pass over all pixels and say nothing."""

import numpy as np
import pytest
from PIL import Image as Pillow
from streaming.members import encoded

from diffusion_trainer.streaming.damage import Undecodable
from diffusion_trainer.streaming.decoding import MAX_SCANS, picture_of


@pytest.mark.parametrize("before", [b"", b"\xff\xfe\x00\x06\xff\xc0\x00\x02", b"\xff\xfe\x00\x02\xff\xff\xfe\x00\x02"])
def test_a_progressive_jpeg_has_a_bounded_number_of_scans(before):
    """Each of these passes over all pixels and says nothing: a code for the end of 2^14 blocks is all that it has.
    before: a comment that looks like a sequential frame; one behind a byte that fills."""
    plain = encoded(Pillow.new("L", (16, 16), 77), "JPEG", progressive=True)
    table = b"\xff\xc4\x00\x14\x10" + bytes([1, *15 * [0]]) + b"\xe0"
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + bytes(2)

    def decoded(scans: int) -> np.ndarray:
        extra = scans - plain.count(b"\xff\xda")
        return picture_of(memoryview(plain[:2] + before + plain[2:-2] + table + scan * extra + plain[-2:])).pixels(1)[0]

    assert (decoded(MAX_SCANS) == 77).all()
    with pytest.raises(Undecodable, match=f"more than {MAX_SCANS} scans"):
        decoded(MAX_SCANS + 1)


def test_what_looks_like_scans_in_a_comment_of_a_sequential_jpeg_is_none():
    plain = encoded(Pillow.new("L", (16, 16), 77), "JPEG")
    comment = b"\xff\xfe\x01\x02" + b"\xff\xda" * 128
    assert (picture_of(memoryview(plain[:2] + comment + plain[2:])).pixels(1)[0] == 77).all()


@pytest.mark.parametrize("at_first", [1, 98])
def test_a_sequential_jpeg_has_as_few(at_first):
    """A scan of one component without bits: libjpeg takes zeros for them, over all pixels, and says so at the end."""
    plain = encoded(Pillow.new("RGB", (16, 16)), "JPEG", subsampling=0)
    at = plain.index(b"\xff\xda")
    scan = lambda component: b"\xff\xda\x00\x08\x01" + bytes([component, 0x11 * (component > 1), 0, 63, 0, 0])  # noqa: E731
    damaged = plain[:at] + scan(1) * at_first + scan(2) + scan(3)
    with pytest.raises(Undecodable, match="premature end"):
        picture_of(memoryview(damaged + b"\xff\xd9")).pixels(3)
    with pytest.raises(Undecodable, match=f"more than {MAX_SCANS} scans"):
        picture_of(memoryview(damaged + scan(1) * (99 - at_first) + b"\xff\xd9")).pixels(3)


def test_behind_a_scan_of_all_components_libjpeg_reads_no_other():
    """So they need not be counted."""
    plain = encoded(Pillow.new("RGB", (16, 16)), "JPEG")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00"
    with pytest.raises(Undecodable, match="Didn't expect more than one scan"):
        picture_of(memoryview(plain[:-2] + scan * 300 + plain[-2:])).pixels(3)
