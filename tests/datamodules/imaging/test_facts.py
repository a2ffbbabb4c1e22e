"""Facts of samples as spelled in the large public sets, and filters that count what they drop."""

import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rewurst import UsageError
from rewurst.datamodules.imaging.facts import (
    FACTS_DTYPE,
    UNREADABLE,
    Facts,
    caption_of,
    facts_array,
    facts_of,
    image_suffix,
    no_caption,
)
from rewurst.datamodules.imaging.filters import Filters
from rewurst.datamodules.imaging.header import DecodeError

PAPER = Filters(min_size=512, max_size=4096, max_watermark=0.5, min_aesthetic=5, max_unsafe=0.99)


def image(width: int, height: int, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, kind, **options)
    return file.getvalue()


def sample(text: str | None = "a cat", **values: Any) -> dict[str, bytes]:
    members = {"jpg": image(30, 20, "JPEG"), "json": json.dumps(values).encode()}
    return members | ({} if text is None else {"txt": text.encode()})


def test_a_sample_of_img2dataset() -> None:
    found = facts_of(
        sample(
            text="  a cat\n",
            original_width=1200,
            original_height=800,
            width=30,
            height=20,
            pwatermark=0.25,
            punsafe=0.125,
            aesthetic=6.5,
        )
    )
    assert found == Facts(30, 20, 1200, 800, 5, 0.25, 6.5, 0.125)
    array = facts_array([found, UNREADABLE])
    assert array.dtype == FACTS_DTYPE
    assert array[0].item() == found
    assert math.isnan(array[1]["watermark"])


@pytest.mark.parametrize(
    ("values", "field", "expected"),
    [
        ({"AESTHETIC_SCORE": 5.5}, "aesthetic", 5.5),
        ({"aesthetic_score_laion_v2": 5.5}, "aesthetic", 5.5),
        ({"aesthetic": None, "AESTHETIC_SCORE": 4}, "aesthetic", 4.0),
        ({"pwatermark": "0.75"}, "watermark", 0.75),
        ({"watermark_score": 0.75}, "watermark", 0.75),
        ({"PUNSAFE": 0.5}, "unsafe", 0.5),
        ({"WIDTH": 640, "HEIGHT": 480}, "original_width", 640),
        ({"width": 640, "height": 480}, "original_width", 0),
        ({"original_width": 640}, "original_width", 0),
        ({"original_width": None, "original_height": None, "WIDTH": 64, "HEIGHT": 48}, "original_height", 48),
        ({"original_width": -1, "original_height": 10**12}, "original_height", 0),
    ],
)
def test_spellings(values: dict[str, Any], field: str, expected: float) -> None:
    assert getattr(facts_of(sample(**values)), field) == expected


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_scores_of_any_type_are_numbers_or_unknown(value: Any) -> None:
    found = facts_of(sample(pwatermark=value, original_width=value, original_height=value))
    assert math.isnan(found.watermark) or math.isfinite(found.watermark)
    assert 0 <= found.original_width < 2**31
    facts_array([found])


def test_sizes_are_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert facts_of({"jpg": image(30, 20, "JPEG", exif=exif)})[:2] == (20, 30)


def test_the_image_of_a_sample() -> None:
    assert image_suffix({"txt": b"", "seg.png": b"", "png": b"", "jpg": b""}) == "jpg"
    assert image_suffix({"JPEG": b""}) == "JPEG"
    for members, only in (({"txt": b"", "cls": b""}, ".txt, .cls"), ({}, "nothing")):
        with pytest.raises(DecodeError, match=f"no image, only {only}"):
            image_suffix(members)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"jpg": b"<html>"}, "not a JPEG"),
        ({"jpg": image(3, 3)[:20]}, "the png header is cut off"),
        ({"json": b"{"}, r"\.json is not valid JSON"),
        ({"json": b"[]"}, r"\.json contains a list, expected an object"),
        ({"json": b"\xff"}, r"\.json is not valid JSON"),
    ],
)
def test_broken_samples(changes: dict[str, bytes], reason: str) -> None:
    with pytest.raises(DecodeError, match=reason) as error:
        facts_of(sample() | changes)
    assert "\n" not in str(error.value)


def test_a_limit_of_pixels() -> None:
    with pytest.raises(DecodeError, match="30 x 20 pixels are more than 500"):
        facts_of(sample(), max_pixels=500)


def test_captions() -> None:
    members = sample("\ufeff in text \n", caption="in json", number=3, empty=" ")
    assert caption_of(members) == "in text"
    assert caption_of(members, "caption") == "in json"
    assert caption_of(members, "number") is None
    assert caption_of(members, "empty") is None
    assert caption_of(members, "absent") is None
    assert caption_of({"jpg": b""}) is None
    with pytest.raises(DecodeError, match=r"^\.txt: byte 3 \(0xe9\) is not valid UTF-8; convert it to UTF-8$"):
        caption_of({"txt": b"caf\xe9"})
    assert facts_of(sample(None)).caption_length == -1


def test_missing_captions() -> None:
    members = sample(None, caption="in json", url="http://...", width=3)
    assert str(no_caption("a.tar", None, members)) == (
        "a.tar: no sample has a caption (.txt), they have .jpg, .json; caption_key can be one of: caption, url"
    )
    assert str(no_caption("a.tar", "captoin", members)) == (
        "a.tar: caption_key is 'captoin', which no sample has; did you mean 'caption'?"
    )
    assert str(no_caption("a.tar", "body", {"jpg": b""})) == (
        "a.tar: caption_key is 'body', which no sample has; no .json has text either"
    )
    assert isinstance(no_caption("a.tar", "body", {"json": b"{"}), UsageError)


GOOD = Facts(600, 700, 0, 0, 20, 0.1, 6.0, 0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"width": 512, "watermark": 0.5, "aesthetic": 5.0, "unsafe": 0.99}, None),  # limits are inside
        ({"width": 0}, "unreadable"),
        ({"caption_length": -1}, "no caption"),
        ({"width": 511}, "min_size"),
        ({"original_width": 300, "original_height": 900}, "min_size"),  # enlarged by the set
        ({"height": 4097}, "max_size"),
        ({"original_width": 5000, "original_height": 900}, "max_size"),
        ({"watermark": 0.51}, "max_watermark"),
        ({"aesthetic": 4.9}, "min_aesthetic"),
        ({"unsafe": 0.995}, "max_unsafe"),
        ({"unsafe": math.nan}, None),
        ({"width": 10, "watermark": 1.0}, "min_size"),  # the first reason counts
    ],
)
def test_the_papers_filters(changes: dict[str, Any], reason: str | None) -> None:
    kept, counts = PAPER.keep(facts_array([GOOD, GOOD._replace(**changes)]))
    assert kept.tolist() == [True, reason is None]
    assert counts == ({} if reason is None else {reason: 1})


def test_lengths_and_unknown_scores() -> None:
    facts = facts_array([GOOD._replace(caption_length=n) for n in (0, 5, 9, 30)])
    kept, counts = Filters(min_caption_length=5, max_caption_length=9).keep(facts)
    assert kept.tolist() == [False, True, True, False]
    assert counts == {"min_caption_length": 1, "max_caption_length": 1}
    unknown = facts_array([GOOD, GOOD._replace(watermark=math.nan), GOOD._replace(aesthetic=math.nan)])
    kept, counts = Filters(max_watermark=0.5, unknown="drop").keep(unknown)
    assert kept.tolist() == [True, False, True]  # only requested facts have to be known
    assert counts == {"watermark unknown": 1}


def test_without_filters_all_usable_images_are_kept() -> None:
    facts = facts_array([GOOD, UNREADABLE, GOOD._replace(caption_length=-1), Facts(1, 1, caption_length=1)])
    kept, counts = Filters().keep(facts)
    assert kept.tolist() == [True, False, False, True]
    assert counts == {"unreadable": 1, "no caption": 1}
    assert Filters().keep(facts[:0])[0].shape == (0,)


@given(st.lists(st.builds(Facts, *[st.integers(0, 5000)] * 4, st.integers(-1, 9), *[st.floats(0, 10, width=32)] * 3)))
def test_every_picture_is_kept_or_counted_once(facts: list[Facts]) -> None:
    kept, counts = PAPER.keep(facts_array(facts))
    assert kept.sum() + sum(counts.values()) == len(facts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unknown": "maybe"}, "unknown is 'maybe', expected keep or drop"),
        ({"min_size": 9, "max_size": 5}, "min_size is 9, expected at most max_size, which is 5"),
        ({"max_watermark": 5}, "max_watermark is 5, expected a probability from 0 to 1"),
        ({"max_unsafe": math.nan}, "max_unsafe is nan, expected a probability"),
    ],
)
def test_wrong_filters(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Filters(**arguments)
