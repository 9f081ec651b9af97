"""Labels, texts and JSON out of members, or damage."""

import json

import pytest
import torch
from streaming.members import LABEL, decoded

from diffusion_trainer.streaming.arrays import Json, Label, Text
from diffusion_trainer.streaming.damage import MissingField, TooLarge, Undecodable


@pytest.mark.parametrize("text", ["0", "7", "999", "0012", "5\n", "999999999999999999"])
def test_labels_are_decimal_digits(text):
    got = decoded(Label(), text.encode())
    assert (got.shape, got.dtype, got.item()) == ((), torch.int64, int(text))


@pytest.mark.parametrize("text", ["", "-1", "+1", "1_0", "0x1", "1.0", "1 2", "true", "٣", "1" * 19, "9" * 5000, "\0"])
def test_other_labels_are_damage_and_shown(text):
    with pytest.raises(Undecodable, match=r"decimal digits; it has .* begins with b'"):
        decoded(Label(), text.encode())


def test_labels_in_json():
    field = Label("json", "label")
    assert decoded(field, LABEL).item() == 3
    with pytest.raises(MissingField, match="no 'label'"):
        decoded(field, b'{"class": 3}')
    for value in (b"true", b"-1", b"1.0", b'"3"', b"null", b"[3]", b"1000000000000000000", b"9" * 5000):
        with pytest.raises(Undecodable):
            decoded(field, b'{"label": ' + value + b"}")
    for text in (b"[3]", b"3"):
        with pytest.raises(MissingField):
            decoded(field, text)


@pytest.mark.parametrize(
    ("field", "text"),
    [(Label(num_classes=10), b"%d"), (Label("json", "label", num_classes=10), b'{"label": %d}')],
    ids=["cls", "json"],
)
def test_a_label_that_is_not_below_the_number_of_classes_is_damage(field, text):
    for label in (0, 9):
        assert decoded(field, text % label).item() == label
    for label in (10, 11, 10**17):
        with pytest.raises(Undecodable, match=rf"label {label} is out of range: there are 10 classes, 0 to 9"):
            decoded(field, text % label)


def test_text_and_json_are_python_objects():
    assert decoded(Text(), "ein Bär 🐻".encode()) == "ein Bär 🐻"
    assert decoded(Json(), LABEL) == json.loads(LABEL)
    assert (Text().stored, Json().stored, Text("caption").extensions) == (None, None, ("caption",))


@pytest.mark.parametrize("data", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", "ä".encode("latin-1")])
def test_text_that_is_no_utf8_is_damage(data):
    with pytest.raises(Undecodable, match=r"not UTF-8.*begins with b'\\x"):
        decoded(Text(), data)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1,]", b"NaN", b"-Infinity", b"\xef\xbb\xbf1", b"[" * 100_000, '"a"'.encode("utf-16"), b'"\xff"'],
)
def test_what_is_no_json_is_damage(data):
    with pytest.raises(Undecodable):
        decoded(Json(), data)
    with pytest.raises(Undecodable):
        decoded(Label("json", "label"), data)


def test_long_texts_are_damage():
    for field in (Text(max_bytes=5), Json(max_bytes=5)):
        assert decoded(field, b"12345") in ("12345", 12345)
        with pytest.raises(TooLarge, match="6 bytes, more than max_bytes=5"):
            decoded(field, b"123456")
