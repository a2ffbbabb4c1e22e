"""LightningModules, and the pipeline from text to images.

Classes are imported on first use, so that language models do not need torchvision, nor image models tokenizers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .causal_lm import CausalLM as CausalLM
    from .latent_diffusion import LatentDiffusion as LatentDiffusion
    from .optimizers.eight_bit import AdamW8bit as AdamW8bit
    from .optimizers.eight_bit import Lion as Lion
    from .optimizers.eight_bit import Lion8bit as Lion8bit
    from .optimizers.muon import Muon as Muon
    from .pipeline.text_to_image import TextToImage as TextToImage
    from .stage_a import StageA as StageA
    from .stage_b import StageB as StageB
    from .stage_c import StageC as StageC

_MODULES = {
    "AdamW8bit": "optimizers.eight_bit",
    "CausalLM": "causal_lm",
    "LatentDiffusion": "latent_diffusion",
    "Lion": "optimizers.eight_bit",
    "Lion8bit": "optimizers.eight_bit",
    "Muon": "optimizers.muon",
    "StageA": "stage_a",
    "StageB": "stage_b",
    "StageC": "stage_c",
    "TextToImage": "pipeline.text_to_image",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
