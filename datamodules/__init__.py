"""Data modules that stream exact global batches from WebDataset shards.

Classes are imported when they are asked for: the processes that tokenize import this package and need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Corpus as Corpus
    from .images import ImageTextDataModule as ImageTextDataModule
    from .imaging.filters import Filters as Filters
    from .latents import LatentDataModule as LatentDataModule
    from .replay_loader import ReplayLoader as ReplayLoader
    from .text import TextDataModule as TextDataModule

_MODULES = {
    "Corpus": "base",
    "Filters": "imaging.filters",
    "ImageTextDataModule": "images",
    "LatentDataModule": "latents",
    "ReplayLoader": "replay_loader",
    "TextDataModule": "text",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
