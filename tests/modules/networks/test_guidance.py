"""Guidance of Stage B: away from no embedding and the unwanted text, as the paper samples (section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rewurst.modules.networks import ConditionCache, StageBUNet

SIZES = {"c_hidden": [8, 16], "c_cond": 16, "effnet_embd": 4}


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guided_noise_is_extrapolated_from_the_unconditional_one(scale: float, randomize: Callable[..., Any]) -> None:
    unet = randomize(StageBUNet.from_preset("tiny", **SIZES)).double()
    width = unet.config["clip_embd"]
    x, t, z = torch.randn(2, 4, 8, 8).double(), torch.rand(2).double(), torch.randn(2, 4, 2, 2).double()
    wanted, unwanted = torch.randn(2, 2, 3, width).double()
    both = torch.cat([wanted, unwanted]) if scale > 1 else wanted
    conditional = unet(x, t, z, wanted)
    cache: ConditionCache = {}
    expected = conditional
    if scale > 1:
        unconditional = unet(x, t, torch.zeros_like(z), unwanted)
        expected = unconditional + scale * (conditional - unconditional)
        assert (expected - conditional).abs().max() > 0.01
    for _ in range(2):  # the second time from what the first has kept
        torch.testing.assert_close(unet.guided(x, t, z, both, cache, scale), expected)
