"""Build the networks that a module loads from files without reading weights, even if the files are missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .. import UsageError
from ..modules.losses.perceptual import LPIPS
from ..modules.networks import Prior, StageBUNet, TextEncoder
from ..modules.networks.base import Network

CLIP_LAYERS = {768: 12, 1024: 24, 1280: 32}
"""Layers of CLIP's text models by their width: ViT-L/14, ViT-H/14 and ViT-bigG/14."""


@contextmanager
def stand_ins(model: Mapping[str, Any], notes: list[str]) -> Iterator[None]:
    """Build networks from the arguments stored in files; assume the paper's if a file is missing.

    Args:
        model: Arguments of the module built in this context, which give the width of a missing text encoder.
        notes: List to which assumptions are added.
    """
    from transformers import PreTrainedModel

    load = Network.from_checkpoint.__func__  # type: ignore[attr-defined]
    load_text_encoder = TextEncoder.from_pretrained

    def network(kind: type[Network], path: str, dtype: torch.dtype | None = None) -> Network:
        if Path(path).exists():
            with unset_fake_temporarily():  # its tensors are checked, then dropped
                config = load(kind, path).config
            return kind.from_config(config)
        notes.append(f"{path} is missing: its {kind.__name__} is assumed to be the paper's")
        return kind.from_preset("paper", **_fitting(kind, model))

    def text_encoder(name: str) -> TextEncoder:
        return load_text_encoder(name) if Path(name).is_dir() else _clip(_text_width(model), notes)

    def from_config(kind: Any, name: str, /, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        model = kind(config or kind.config_class.from_pretrained(name))
        return (model, {}) if kwargs.get("output_loading_info") else model

    def perceptual_loss(path: str | None = None, download: bool = False) -> LPIPS:
        from torchvision.models import vgg16

        return LPIPS(vgg16())

    with ExitStack() as patches:
        patches.enter_context(patch.object(Network, "from_checkpoint", classmethod(network)))
        patches.enter_context(patch.object(PreTrainedModel, "from_pretrained", classmethod(from_config)))
        patches.enter_context(patch.object(TextEncoder, "from_pretrained", text_encoder))
        patches.enter_context(patch.object(LPIPS, "from_files", perceptual_loss))
        yield


@contextmanager
def rows_of_one_sequence() -> Iterator[None]:
    """Keep transformers from making a mask: it takes positions without values for packed sequences."""
    from transformers import masking_utils

    with patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        yield


def _learner(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the network that is trained between frozen ones; empty if there is none."""
    learners: tuple[tuple[str, type[Network]], ...] = (("prior", Prior), ("unet", StageBUNet))
    for name, kind in learners:
        if name in model:
            given = {"preset": model[name]} if isinstance(model[name], str) else dict(model[name])
            defaults = {name: parameter.default for name, parameter in signature(kind).parameters.items()}
            return defaults | kind.presets.get(given.pop("preset", ""), {}) | given
    return {}


def _fitting(kind: type[Network], model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the channels that a missing network must have to fit the trained one."""
    channels = {"SemanticCompressor": "c_latent", "VQGAN": "latent_channels"}.get(kind.__name__)
    learner = _learner(model)
    return {channels: learner["c_in"]} if channels and learner else {}


def _text_width(model: Mapping[str, Any]) -> int:
    """Return the width of the text states that a module's network expects."""
    learner = _learner(model)
    if not learner:
        raise UsageError("the text encoder is not in a local folder, and no network tells its width: give a folder")
    return int(learner.get("clip_embd", learner["c_cond"]))


def _clip(width: int, notes: list[str]) -> TextEncoder:
    """Return a CLIP text model of the given width with a dummy tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    if width not in CLIP_LAYERS:
        notes.append(f"the text encoder of width {width} is not one of CLIP's: assuming 12 layers")
    heads = max(1, width // 64)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=CLIP_LAYERS.get(width, 12),
    )
    return TextEncoder(CLIPTextModel(config), _NoWords())


class _NoWords:
    """Tokenizer that turns any text into a full row of one token."""

    model_max_length = 77

    def __call__(self, texts: Sequence[str], **options: Any) -> SimpleNamespace:
        """Return rows of tokens without padding."""
        return SimpleNamespace(**{name: [[1] * 77] * len(texts) for name in ("input_ids", "attention_mask")})
