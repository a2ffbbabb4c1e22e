"""Helpers for tests of the text-to-image pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np

FAST: dict[str, Any] = {"prior_num_inference_steps": 3, "num_inference_steps": 2}


def check_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert ((theirs > 0) & (theirs < 1)).mean() > 0.9, "clamped pictures would hide differences"
    assert theirs.std() > 0.03
    assert np.abs(ours - theirs).max() < 1e-4


def array(pictures: Any) -> np.ndarray:
    images = pictures.images
    assert isinstance(images, np.ndarray)
    return images
