"""Encoders: the Semantic Compressor, whose latents Stage C generates and Stage B decodes, and the text encoder."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import efficientnet_v2_s
from torchvision.models.efficientnet import FusedMBConv, FusedMBConvConfig
from torchvision.ops import Conv2dNormActivation

from ... import UsageError
from .base import Network, Presets
from .weight_files import variant_in

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet, which EfficientNet's weights expect."""


def small_backbone(widths: Sequence[int], depth: int) -> tuple[nn.Sequential, int, int]:
    """Stack stride-2 convolutions, for images too small for EfficientNet; return them, their width and their stride.

    ``depth`` residual blocks of EfficientNetV2 follow. They start as the identity (Goyal et al. 2017, section 5.1),
    because random noise from a latent's surroundings would delay learning.
    """
    layers: list[nn.Module] = [
        Conv2dNormActivation(before, c, kernel_size=3, stride=2, activation_layer=nn.SiLU)
        for before, c in zip([3, *widths], widths, strict=False)
    ]
    block = FusedMBConvConfig(1, 3, 1, widths[-1], widths[-1], num_layers=1)
    for _ in range(depth):
        layers.append(FusedMBConv(block, stochastic_depth_prob=0.0, norm_layer=nn.BatchNorm2d))
        nn.init.zeros_(layers[-1].get_parameter("block.0.1.weight"))
    return nn.Sequential(*layers), widths[-1], 2 ** len(widths)


class SemanticCompressor(Network):
    """EfficientNetV2-S features and a 1x1 convolution to 16 normalized channels (arXiv 2306.00637).

    Args:
        c_latent: Channels of the latents.
        backbone: "efficientnet_v2_s" (stride 32), or "small": stride-2 convolutions of the given widths.
        widths: Widths of the small backbone's layers; its stride is 2 to the power of their number.
        depth: Residual blocks at the end of the small backbone. Without them, a latent sees little more of the image
            than its own square; with them, it can also encode what that square is a part of.
        input_scale: Factor by which images are resized first: 0.75 turns stride 32 into 42.67 pixels per latent.
    """

    diffusers_class = "SemanticCompressor"
    _no_split_modules: ClassVar[list[str]] = ["FusedMBConv", "MBConv", "Conv2dNormActivation"]
    presets: ClassVar[Presets] = {
        "tiny": {"backbone": "small", "widths": [16, 32, 64, 64], "input_scale": 1.0},
        "small": {},
        "paper": {},
        "released": {},
    }

    def __init__(
        self,
        c_latent: int = 16,
        backbone: str = "efficientnet_v2_s",
        widths: Sequence[int] = (32, 64, 128, 256),
        input_scale: float = 0.75,
        depth: int = 0,
    ) -> None:
        super().__init__(c_latent=c_latent, backbone=backbone, widths=widths, input_scale=input_scale, depth=depth)
        self.input_scale = input_scale
        if backbone == "efficientnet_v2_s":
            self.backbone, c, self.stride = efficientnet_v2_s().features, 1280, 32
        elif backbone == "small":
            self.backbone, c, self.stride = small_backbone(widths, depth)
        else:
            raise UsageError(f"backbone {backbone!r} is unknown: choose 'efficientnet_v2_s' or 'small'")
        self.mapper = nn.Sequential(nn.Conv2d(c, c_latent, kernel_size=1, bias=False), nn.BatchNorm2d(c_latent))

    @property
    def pixels_per_latent(self) -> float:
        """Side length of a latent's square in image pixels: 42.67 for the released sizes."""
        return round(self.stride / self.input_scale, 2)

    def latent_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the latents' height and width for images of height and width ``size``."""
        return tuple(-(-round(side * self.input_scale) // self.stride) for side in size)

    def forward(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, "batch c_latent h_latent w_latent"]:
        """Compress images in [0, 1]."""
        size = [round(side * self.input_scale) for side in images.shape[-2:]]
        dtype = self.get_parameter("mapper.0.weight").dtype
        mean, deviation = (torch.tensor(c, device=images.device)[:, None, None] for c in (MEAN, DEVIATION))
        resized = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        latents: Tensor = self.mapper(self.backbone(((resized - mean) / deviation).to(dtype)))
        return latents


class TextEncoder(nn.Module):
    """A CLIP text model with its tokenizer.

    Args:
        model: A ``transformers.CLIPTextModel``.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.length = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    @classmethod
    def from_pretrained(
        cls, model: str | Path, tokenizer: str | Path | None = None, variant: str | None = None
    ) -> "TextEncoder":
        """Load from the hub or from folders; the tokenizer is in the model's folder, next to it, or given.

        Args:
            model: Folder or name on the hub of the text model.
            tokenizer: Folder or name on the hub of the tokenizer.
            variant: Variant of the files to prefer if a folder has it, such as ``fp16``.

        Raises:
            UsageError: The model or the tokenizer does not exist, or it is not a CLIP text model.
        """
        from transformers import AutoTokenizer, CLIPTextModel

        sibling = Path(model).parent / Path(model).name.replace("text_encoder", "tokenizer")
        if tokenizer is None:
            alone = Path(model).is_dir() and not (Path(model) / "tokenizer_config.json").is_file()
            tokenizer = sibling if alone and sibling.is_dir() else model
        for part in (model, tokenizer):
            if Path(part).is_absolute() and not Path(part).is_dir():
                raise UsageError(f"{part} is not a folder: it should contain the text encoder or its tokenizer")
        folder = Path(model)
        stem = "pytorch_model" if any(folder.glob("pytorch_model*")) and not any(folder.glob("model*")) else "model"
        chosen = variant_in(folder, stem, variant)
        try:
            text_model = CLIPTextModel.from_pretrained(str(model), variant=chosen)
            return TextEncoder(text_model, AutoTokenizer.from_pretrained(str(tokenizer)))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise UsageError(f"{model} cannot be loaded as a CLIP text model with tokenizer: {reason[0]}") from None

    @property
    def width(self) -> int:
        """Width of a text state in channels."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Float[Tensor, "batch n c"]:
        """Return all states of the last layer, including padding, as in the stages' training."""
        states: Tensor = self(texts)
        return states

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "batch n c"]:
        """Return the same as ``encode``; call this if the encoder is trained."""
        tokens = self.tokenizer(list(texts), padding="max_length", max_length=self.length, truncation=True)
        for text, mask in zip(texts, tokens.attention_mask, strict=True):
            if mask[-1] and (count := len(self.tokenizer(text).input_ids)) > self.length:
                warnings.warn(f"{text!r} has {count} tokens, of which {self.length} are used", stacklevel=2)
        device = next(self.model.parameters()).device
        ids, masks = (torch.tensor(rows, device=device) for rows in (tokens.input_ids, tokens.attention_mask))
        out = self.model(ids, attention_mask=masks)
        states: Tensor = out.last_hidden_state
        return states

    def save(self, model: str | Path, tokenizer: str | Path) -> None:
        """Write the model and the tokenizer in transformers' format."""
        self.model.save_pretrained(model)
        self.tokenizer.model_max_length = self.length
        self.tokenizer.save_pretrained(tokenizer)
