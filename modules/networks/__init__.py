"""Würstchen's networks: plain ``nn.Module``s, independent of Lightning."""

from .base import Network, compile_blocks, describe
from .encoders import SemanticCompressor, TextEncoder
from .layers import ConditionCache
from .prior import Prior
from .unet import StageBUNet
from .vqgan import VQGAN, PatchDiscriminator, Quantized

__all__ = [
    "VQGAN",
    "ConditionCache",
    "Network",
    "PatchDiscriminator",
    "Prior",
    "Quantized",
    "SemanticCompressor",
    "StageBUNet",
    "TextEncoder",
    "compile_blocks",
    "describe",
]
