"""Corpora of latents: encoded images of another corpus, row by row, and the networks that encoded them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import UsageError
from ..imaging.geometry import Size
from ..imaging.header import DecodeError
from ..storage.random_access import join, read_whole
from .images import ImageIndex, ImageShards

EMPTY_TEXT_FILE = "empty_text.npy"
MAKERS = {"z": "compressor", "a": "stage_a", "text": "text_encoder"}
"""Network that makes each member ``<key>.<name>.npy``."""


@dataclass(frozen=True, kw_only=True)
class LatentIndex(ImageIndex):
    """The contents of ``index.json``; row i is row i of the images, whose ``facts.npy`` is copied here.

    Attributes:
        what: Names of the arrays of a sample: ``z``, ``a``, ``text``.
        dtype: Data type of the arrays.
        sizes: Heights and widths in pixels of the encoded images, from tall to wide.
        resize: Side of the square that images were resized to cover before cropping; 0 if they covered the size itself.
        images_sha256: Fingerprint of the image corpus.
        compressor_sha256: Fingerprint of the network, like the other ``..._sha256``; empty if it made nothing.
        compressor_source: Path or name of the network, like the other ``..._source``.
    """

    what: tuple[str, ...]
    dtype: str
    sizes: tuple[Size, ...]
    resize: int = 0
    images_sha256: str
    compressor_sha256: str = ""
    compressor_source: str = ""
    stage_a_sha256: str = ""
    stage_a_source: str = ""
    text_encoder_sha256: str = ""
    text_encoder_source: str = ""
    kind: str = "latents"

    @classmethod
    def not_in_fingerprint(cls) -> tuple[str, ...]:
        """Return the names of the sources, which do not affect the fingerprint."""
        return tuple(f"{maker}_source" for maker in MAKERS.values())

    @property
    def made_by(self) -> dict[str, dict[str, str]]:
        """Fingerprint and source of each network that made something."""
        return {
            maker: {"sha256": getattr(self, f"{maker}_sha256"), "source": getattr(self, f"{maker}_source")}
            for name, maker in MAKERS.items()
            if name in self.what
        }


class LatentShards(ImageShards):
    """Random access to the samples of a corpus of latents."""

    index: LatentIndex
    index_type = LatentIndex

    def empty_text(self) -> NDArray[Any]:
        """Return the encoded text "", shape (length, width).

        Raises:
            UsageError: The file is missing or cannot be read.
        """
        where = join(self.path, EMPTY_TEXT_FILE)
        try:
            return read_array(read_whole(where))
        except FileNotFoundError:
            raise UsageError(f"{where}: missing; prepare the latents again") from None
        except DecodeError as error:
            raise UsageError(f"{where}: {error}; prepare the latents again") from None

    def arrays(self, members: Mapping[str, bytes]) -> dict[str, NDArray[Any]]:
        """Return the arrays of a sample by name.

        Raises:
            DecodeError: There are none because the image could not be read, or they do not match the index.
        """
        if reason := json.loads(members.get("json", b"{}")).get("left_out"):
            raise DecodeError(reason)
        arrays = {}
        for name in self.index.what:
            if f"{name}.npy" not in members:
                raise DecodeError(f"its {name}.npy is missing")
            arrays[name] = read_array(members[f"{name}.npy"])
            if arrays[name].dtype != self.index.dtype:
                raise DecodeError(f"its {name}.npy contains {arrays[name].dtype}, expected {self.index.dtype}")
        return arrays


def array_bytes(array: NDArray[Any]) -> bytes:
    """Return an array as the bytes of a ``.npy`` file."""
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return content.getvalue()


def read_array(content: bytes) -> NDArray[Any]:
    """Return the array of a ``.npy`` file.

    Raises:
        DecodeError: The content is not a ``.npy`` file, or contains objects.
    """
    try:
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DecodeError(f"not a readable array ({str(error).splitlines()[0]})") from None
    return array
