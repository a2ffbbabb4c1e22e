"""Crops and buckets: inside the picture, of the right shape, reproducible; one resampling for resize and crop."""

import io
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rewurst import UsageError
from rewurst.datamodules.imaging.decoding import decode
from rewurst.datamodules.imaging.geometry import (
    NO_BUCKET,
    Crop,
    buckets,
    crop,
    nearest_bucket,
    resample,
    size_to_decode,
    uniform,
)

SIDES = st.integers(1, 5000)
SIZES = st.tuples(SIDES, SIDES)


@given(SIZES, st.tuples(st.integers(1, 600), st.integers(1, 600)), st.none() | st.integers(0, 2**63 - 1))
def test_a_crop_is_the_largest_part_of_the_targets_shape(
    size: tuple[int, int], target: tuple[int, int], seed: int | None
) -> None:
    found = crop(size, target, seed)
    assert 0 <= found.top <= size[0] - found.height
    assert 0 <= found.left <= size[1] - found.width
    assert found.height == size[0] or found.width == size[1]
    scale = max(target[0] / size[0], target[1] / size[1])
    assert abs(found.height - max(1, target[0] / scale)) <= 0.5 + 1e-9
    assert abs(found.width - max(1, target[1] / scale)) <= 0.5 + 1e-9


def test_validation_crops_the_center_and_training_every_place_equally() -> None:
    assert crop((100, 60), (32, 32)) == (20, 0, 60, 60)
    places = Counter(crop((63, 60), (20, 20), seed).top for seed in range(4000))
    assert sorted(places) == [0, 1, 2, 3]
    assert min(places.values()) > 850
    assert crop((63, 60), (20, 20), 5) == crop((63, 60), (20, 20), 5)


def test_crops_of_a_picture_that_is_resized_to_more_than_is_shown() -> None:
    """128 pixels of a picture resized to 256 are half of its short side."""
    assert crop((512, 1024), (128, 128), covered=(256, 256)) == (128, 384, 256, 256)
    assert crop((50, 40), (128, 128), covered=(256, 256)) == (15, 10, 20, 20)


def test_draws_are_uniform_and_depend_on_the_purpose() -> None:
    draws = np.array([uniform(seed, "crop", 2) for seed in range(2000)])
    assert ((draws >= 0) & (draws < 1)).all()
    np.testing.assert_allclose(draws.mean(0), 0.5, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(draws.T)[0, 1], 0, atol=0.07)
    assert uniform(3, "crop", 2) != uniform(3, "caption", 2)
    assert uniform(2**63 - 1, "crop", 1) == uniform(2**63 - 1, "crop", 1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 16), st.integers(0, 32))
def test_resampling_a_crop_is_cropping_and_resizing_by_pillow(row: int, column: int) -> None:
    pixels = np.random.default_rng(1).integers(256, size=(96, 144, 3), dtype=np.uint8)
    found = resample(pixels, (96, 144), Crop(3 * row, 3 * column, 48, 48), (32, 32))
    part = Image.fromarray(pixels).crop((3 * column, 3 * row, 3 * column + 48, 3 * row + 48))
    expected = np.asarray(part.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_pictures_of_the_right_size_are_not_resampled() -> None:
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    assert np.shares_memory(resample(pixels, (20, 30), Crop(0, 0, 20, 30), (20, 30)), pixels)


@pytest.mark.parametrize("size", [(1031, 773), (512, 2048), (333, 999)])
def test_a_reduced_jpeg_shows_the_same_crop(size: tuple[int, int]) -> None:
    """A disc stays at its place to a fraction of a pixel, however the file was decoded."""
    y, x = np.mgrid[: size[0], : size[1]]
    waves = 128 + 60 * np.sin(y / 23) + 60 * np.cos(x / 31)
    file = io.BytesIO()
    Image.fromarray(waves.clip(0, 255).astype(np.uint8)).convert("RGB").save(file, "JPEG", quality=95)
    for seed in range(4):
        shown = crop(size, (64, 64), seed)
        at_least = size_to_decode(size, shown, (64, 64))
        reduced = decode(file.getvalue(), at_least)
        whole = decode(file.getvalue())
        assert reduced.shape[0] < whole.shape[0]
        pictures = [resample(pixels, size, shown, (64, 64)).astype(float) for pixels in (reduced, whole)]
        assert np.abs(pictures[0] - pictures[1]).mean() < 0.5
        assert np.abs(pictures[0] - pictures[1])[2:-2, 2:-2].max() <= 3


@given(SIZES, st.tuples(st.integers(1, 600), st.integers(1, 600)))
def test_decoding_asks_for_no_more_than_there_is(size: tuple[int, int], target: tuple[int, int]) -> None:
    shown = crop(size, target)
    height, width = size_to_decode(size, shown, target)
    assert 1 <= height <= size[0]
    assert 1 <= width <= size[1]
    assert height == size[0] or height * shown.height >= 2 * target[0] * size[0] - shown.height


@given(st.integers(1, 32), st.sampled_from([4, 8, 16, 64, 128]), st.floats(1, 4))
def test_buckets_have_about_the_area_of_the_square(multiples: int, multiple: int, max_aspect: float) -> None:
    side = multiples * multiple
    found = buckets(side, multiple, max_aspect)
    assert (side, side) in found
    assert set(found) == {(w, h) for h, w in found}
    assert [w / h for h, w in found] == sorted({w / h for h, w in found})
    for height, width in found:
        assert height % multiple == width % multiple == 0
        assert max(height, width) <= max_aspect * min(height, width)
        assert height * width <= side * side
        longer = max(height, width) + multiple
        assert longer * min(height, width) > side * side or longer > max_aspect * min(height, width)


def test_buckets_of_sdxl() -> None:
    """Its appendix lists the sizes; ours have the largest area for each short side."""
    theirs = {(704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1024), (1024, 1024)}
    ours = {(h, w) for h, w in buckets(1024, 64) if h <= w}
    assert theirs - {(960, 1024)} <= ours
    assert all(1024**2 * 0.93 < h * w <= 1024**2 for h, w in ours)


@given(st.lists(SIZES, min_size=1, max_size=20))
def test_the_nearest_bucket_is_nearest_by_logarithm(pictures: list[tuple[int, int]]) -> None:
    found = buckets(512, 64)
    heights, widths = np.array(pictures).T
    for (height, width), number in zip(pictures, nearest_bucket(heights, widths, found), strict=True):
        distances = [abs(math.log(width / height) - math.log(w / h)) for h, w in found]
        assert distances[number] <= min(distances) + 1e-12


def test_pictures_without_a_bucket() -> None:
    found = buckets(64, 16)
    heights, widths = np.array([64, 63, 32, 0, 31]), np.array([64, 64, 32, 0, 31])
    square = found.index((64, 64))
    assert nearest_bucket(heights, widths, found).tolist() == [square, square, square, NO_BUCKET, square]
    assert nearest_bucket(heights, widths, found, 1).tolist() == [square, NO_BUCKET, NO_BUCKET, NO_BUCKET, NO_BUCKET]
    assert nearest_bucket(heights, widths, found, 2).tolist() == [square, square, square, NO_BUCKET, NO_BUCKET]
    assert nearest_bucket(heights[:0], widths[:0], found).shape == (0,)


def test_wrong_buckets() -> None:
    with pytest.raises(UsageError, match="image_size is 100, expected a multiple of 64"):
        buckets(100, 64)
    with pytest.raises(UsageError, match=r"max_aspect is 0\.5, expected 1 or more"):
        buckets(128, 64, 0.5)
