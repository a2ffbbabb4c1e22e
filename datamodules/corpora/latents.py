"""Corpora of latents: what networks made of the images of another corpus, row by row, and which networks these were."""

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
"""Which network makes which member ``<key>.<name>.npy``."""


@dataclass(frozen=True, kw_only=True)
class LatentIndex(ImageIndex):
    """The contents of ``index.json``; row i is row i of the images, whose ``facts.npy`` lies here too.

    Attributes:
        what: Names of the arrays of a sample: ``z``, ``a``, ``text``.
        dtype: Of the arrays.
        sizes: Heights and widths in pixels at which images were shown, from tall to wide.
        resize: Side of a square that images covered before they were cropped; 0 for the size itself.
        images_sha256: Fingerprint of the images' corpus.
        compressor_sha256: Fingerprint of the network; so are the next two, empty where it made nothing.
        compressor_source: Where it came from; so are the next two.
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
        """Where networks came from decides nothing."""
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
    """The samples of a corpus of latents, in any order."""

    index: LatentIndex
    index_type = LatentIndex

    def empty_text(self) -> NDArray[Any]:
        """States of the text "", (length, width).

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
        """The arrays of a sample by name.

        Raises:
            DecodeError: It has none, as its image could not be read, or they are not what the index says.
        """
        if reason := json.loads(members.get("json", b"{}")).get("left_out"):
            raise DecodeError(reason)
        arrays = {}
        for name in self.index.what:
            if f"{name}.npy" not in members:
                raise DecodeError(f"its {name}.npy is missing")
            arrays[name] = read_array(members[f"{name}.npy"])
            if arrays[name].dtype != self.index.dtype:
                raise DecodeError(f"its {name}.npy holds {arrays[name].dtype}, expected {self.index.dtype}")
        return arrays


def array_bytes(array: NDArray[Any]) -> bytes:
    """An array as a ``.npy`` file."""
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return content.getvalue()


def read_array(content: bytes) -> NDArray[Any]:
    """An array from a ``.npy`` file.

    Raises:
        DecodeError: It is none, or holds objects.
    """
    try:
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DecodeError(f"no readable array ({str(error).splitlines()[0]})") from None
    return array
