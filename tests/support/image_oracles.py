"""Measures of pictures by their definitions, without the tested library."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def frechet(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), Heusel et al. 2017."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots)


def clip_score(clip: str, pictures: Tensor, captions: list[str]) -> float:
    """Mean of 100 cosines of picture, (3, h, w) in [0, 1], and caption, at least 0 each."""
    from transformers import CLIPModel, CLIPProcessor

    model: Any = CLIPModel.from_pretrained(clip)
    model.eval()
    processor: Any = CLIPProcessor.from_pretrained(clip)
    scores = []
    for picture, caption in zip((pictures * 255).round().byte().permute(0, 2, 3, 1).numpy(), captions, strict=True):
        inputs = processor(text=[caption], images=[Image.fromarray(picture)], return_tensors="pt")
        with torch.no_grad():
            text = model.text_projection(model.text_model(inputs.input_ids).pooler_output)[0]
            image = model.visual_projection(model.vision_model(inputs.pixel_values).pooler_output)[0]
        scores.append(max(0.0, 100 * float(text @ image / text.norm() / image.norm())))
    return float(np.mean(scores))
