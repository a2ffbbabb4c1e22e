"""The networks that make latents of images, and what an index says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import UsageError
from ...datamodules.corpora.latents import MAKERS, array_bytes
from ...datamodules.imaging.geometry import Size
from ...modules.networks import VQGAN, SemanticCompressor, TextEncoder
from ...modules.networks.weight_files import is_one_file, read_file
from ...modules.shared.frozen import Frozen


class Makers:
    """The networks that make latents.

    Args:
        stage_b: Checkpoint with the compressor, or the compressor's folder.
        what: Names of arrays: ``z``, ``a``, ``text``.
        text_encoder: Folder or hub name, for ``text``.
        stage_a: Checkpoint or folder, for ``a``; by default the one that Stage B's checkpoint names.
        dtype: Of the arrays.
        device: To run on.

    Raises:
        UsageError: A network is missing or cannot be read, or an array is unknown.
    """

    def __init__(
        self,
        stage_b: str,
        what: Sequence[str],
        text_encoder: str | None = None,
        stage_a: str | None = None,
        dtype: str = "float16",
        device: str = "cpu",
    ) -> None:
        if unknown := [name for name in what if name not in MAKERS]:
            raise UsageError(f"what {unknown[0]!r} is unknown: choose among {', '.join(MAKERS)}")
        if "z" not in what:
            raise UsageError(f"what {','.join(what)} lacks z, which Stage C trains on: add it")
        if dtype not in ("float16", "float32"):
            raise UsageError(f"dtype {dtype!r} must be float16 or float32")
        if "text" in what and text_encoder is None:
            raise UsageError("what names text: give text_encoder, the folder or hub name of a frozen CLIP text model")
        self.what, self.dtype, self.device = tuple(name for name in MAKERS if name in what), dtype, torch.device(device)
        self.parts: dict[str, Frozen[Any]] = {
            "z": Frozen(SemanticCompressor.from_checkpoint(stage_b, torch.float32), stage_b)
        }
        if "a" in what:
            source = stage_a or _named_stage_a(stage_b)
            self.parts["a"] = Frozen(VQGAN.from_checkpoint(source, torch.float32), source)
        if "text" in what and text_encoder is not None:
            self.parts["text"] = Frozen(TextEncoder.from_pretrained(text_encoder), text_encoder)

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[Sequence[str]]) -> list[dict[str, NDArray[Any]]]:
        """Arrays by name of each of a batch's images (n, 3, h, w), bytes; text of several captions is (captions, ...).

        Args:
            images: The images.
            captions: Captions of each image, one or more.
        """
        pixels = images.to(self.device).float() / 255
        made = {"z": list(self._stored(self.parts["z"].on(self.device)(pixels)))}
        if "a" in self.parts:
            made["a"] = list(self._stored(self.parts["a"].on(self.device).to_latents(pixels)))
        if "text" in self.parts:
            states = self.parts["text"].on(self.device).encode([text for texts in captions for text in texts])
            ends = np.cumsum([len(texts) for texts in captions])[:-1]
            made["text"] = [one[0] if len(one) == 1 else one for one in np.split(self._stored(states), ends)]
        return [{name: made[name][i] for name in self.what} for i in range(len(images))]

    def _stored(self, made: Tensor) -> NDArray[Any]:
        stored: NDArray[Any] = made.float().cpu().numpy().astype(self.dtype)
        return stored

    def empty_text(self) -> bytes | None:
        """States of the text "" as a file, where there is a text encoder."""
        if "text" not in self.parts:
            return None
        states = self.parts["text"].on(self.device).encode([""])[0]
        return array_bytes(states.float().cpu().numpy().astype(self.dtype))

    def described(self) -> dict[str, Any]:
        """Return the networks' entries in the index."""
        fields: dict[str, Any] = {"what": self.what, "dtype": self.dtype}
        for name, part in self.parts.items():
            fields |= {f"{MAKERS[name]}_sha256": part.fingerprint, f"{MAKERS[name]}_source": part.source}
        return fields

    def bytes_a_sample(self, size: Size) -> int:
        """About how much is stored of an image."""
        compressor = self.parts["z"].module
        numbers = compressor.config["c_latent"] * _cells(size, compressor.pixels_per_latent)
        if "a" in self.parts:
            vqgan = self.parts["a"].module
            numbers += vqgan.config["latent_channels"] * _cells(size, vqgan.compression)
        if "text" in self.parts:
            numbers += self.parts["text"].module.length * self.parts["text"].module.width
        return int(numbers) * np.dtype(self.dtype).itemsize + 2048


def _cells(size: Size, pixels: float) -> float:
    return size[0] / pixels * size[1] / pixels


def _named_stage_a(stage_b: str) -> str:
    named = read_file(stage_b).get("frozen", {}).get("stage_a", {}) if is_one_file(stage_b) else {}
    if "source" not in named:
        raise UsageError(f"{stage_b} names no Stage A: give stage_a")
    return str(named["source"])
