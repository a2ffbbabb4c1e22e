"""Drawn pictures are the same everywhere, recognized by the judge, and balanced between seen and held-out ones."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from rewurst.preparation.sources.pictures.shapes import (
    BACKGROUNDS,
    COLOURS,
    FAMILIES,
    POSITIONS,
    SHADE,
    Judge,
    Shape,
    caption,
    combinations,
    draw,
    held_out,
    picture_seed,
)


def fresh(family: str, seed: int) -> tuple[list[Shape], np.ndarray]:
    shapes = combinations(family)
    return shapes, np.stack([draw(shape, picture_seed(seed, "test", i)) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tenth_of_the_combinations_is_held_out_and_every_value_is_often_seen(family: str) -> None:
    shapes, unseen = combinations(family), held_out(family)
    assert len(shapes) == len(set(shapes)) == 960
    assert len(unseen) == len(set(unseen)) == 96
    assert set(unseen) <= set(shapes)
    for attribute in Shape._fields:
        everywhere = Counter(getattr(shape, attribute) for shape in shapes)
        hidden = Counter(getattr(shape, attribute) for shape in unseen)
        for value, count in everywhere.items():
            assert 0.05 * count <= hidden[value] <= 0.15 * count, (attribute, value)


def test_families_share_no_shape_and_no_color() -> None:
    old, new = (combinations(family) for family in FAMILIES)
    assert not {shape.shape for shape in old} & {shape.shape for shape in new}
    assert not {shape.colour for shape in old} & {shape.colour for shape in new}


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_state_all_five_attributes(family: str) -> None:
    captions = [caption(shape) for shape in combinations(family)]
    assert len(set(captions)) == 960
    assert all(value in caption(shape) for shape in combinations(family) for value in shape)
    shape = Shape("small", "red", "circle", "upper left", "white")
    assert caption(shape) == "a small red circle in the upper left on a white background"


def test_pictures_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for family in FAMILIES:
        for i, shape in enumerate(combinations(family)[::37]):
            digest.update(draw(shape, picture_seed(5, "train", i), 48).tobytes())
    assert digest.hexdigest() == "857b530afe4c67104c39de6963ef526c892c4f08c747310f0eb7f3b315f005dc"


def test_pictures_of_one_combination_differ() -> None:
    shape = Shape("small", "red", "circle", "upper left", "white")
    pictures = {draw(shape, picture_seed(0, split, i)).tobytes() for split in ("train", "val") for i in range(9)}
    assert len(pictures) == 18
    np.testing.assert_array_equal(draw(shape, 3), draw(shape, 3))


@pytest.mark.parametrize("size", [32, 64, 160])
def test_a_picture_shows_its_attributes(size: int) -> None:
    """Checked independently by the shades of corner and middle, the center of mass, and the area."""
    areas: dict[str, list[float]] = {"small": [], "large": []}
    for i, shape in enumerate(combinations()[::7]):
        picture = draw(shape, i, size)
        assert picture.shape == (size, size, 3)
        assert np.abs(picture[0, 0].astype(int) - BACKGROUNDS[shape.background]).max() <= SHADE
        differs = np.abs(picture.astype(int) - picture[0, 0]).sum(-1)
        edge = np.concatenate([differs[0], differs[-1], differs[:, 0], differs[:, -1]])
        assert edge.max() == 0  # all of the shape is in the picture
        x, y = POSITIONS[shape.position]
        row, column = (float(np.average(np.arange(size) + 0.5, weights=differs.sum(1 - axis))) for axis in (0, 1))
        assert abs(row / size - y) < 0.05
        assert abs(column / size - x) < 0.05
        assert np.abs(picture[int(row), int(column)].astype(int) - COLOURS[shape.colour]).max() <= SHADE
        areas[shape.size].append((differs > 0).mean())
    assert max(areas["small"]) < min(areas["large"])


def test_edges_are_antialiased() -> None:
    """A small picture is an averaged large one, as with supersampling."""
    for i, shape in enumerate([*combinations()[::97], *combinations("builtin:shapes-new")[::97]]):
        large = draw(shape, i, 512).astype(float).reshape(64, 8, 64, 8, 3).mean((1, 3))
        difference = np.abs(draw(shape, i, 64) - large)
        assert difference.mean() < 0.5
        assert difference.max() < 80  # at tips, where a distance is not an area


@pytest.mark.parametrize("families", [[family] for family in FAMILIES] + [list(FAMILIES)], ids=["old", "new", "both"])
def test_the_judge_reads_real_pictures(families: list[str]) -> None:
    judge = Judge(64, families=families)
    for family in families:
        for seed in (1, 2):
            shapes, pictures = fresh(family, seed)
            read = judge.read(pictures)
            assert np.mean([found == shape for found, shape in zip(read, shapes, strict=True)]) >= 0.97
        for position, attribute in enumerate(Shape._fields):
            right = np.mean([found[position] == shape[position] for found, shape in zip(read, shapes, strict=True)])
            assert right >= 0.97, attribute


def test_the_judge_is_the_nearest_rendering() -> None:
    """Its sums equal comparisons with fully drawn renderings one by one."""
    judge = Judge(16, renderings=2)
    pictures = np.random.default_rng(0).integers(256, size=(4, 16, 16, 3), dtype=np.uint8)
    m = judge._coverage.astype(float)[:, None, :, None]
    b, d = (values.astype(float)[None, :, None] for values in (judge._backgrounds, judge._contrasts))
    renderings = b + m * d  # (outlines, pairs, pixels, 3)
    for picture, distances in zip(pictures, judge._distances(pictures), strict=True):
        x = picture.reshape(-1, 3).astype(float)
        expected = ((renderings - x) ** 2).sum((2, 3)) - (x**2).sum()
        np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=50)


def test_the_judge_refuses_other_pictures() -> None:
    judge = Judge(16, renderings=1)
    with pytest.raises(ValueError, match=r"images are uint8 of shape \(1, 8, 8, 3\), expected uint8 \(n, 16, 16, 3\)"):
        judge.read(np.zeros((1, 8, 8, 3), dtype=np.uint8))
    assert judge.read(np.zeros((0, 16, 16, 3), dtype=np.uint8)) == []
