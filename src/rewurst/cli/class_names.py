"""Classes of ours that a command line names without their path: imported before the parser looks for them.

The parser finds short names among the classes that are imported. All of them would make a language model wait for
torchvision and an image model for the tokenizers.
"""

from __future__ import annotations

import re
from pathlib import Path

from .. import datamodules, modules


def import_named(args: list[str]) -> None:
    """Imports the modules and data modules that the arguments, or the YAML files among them, speak of."""
    words = set(re.findall(r"\w+", " ".join(args)))
    for arg in args:
        path = Path(arg.partition("=")[2] or arg)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            words |= set(re.findall(r"\w+", path.read_text("utf8", "replace")))
    for package in (modules, datamodules):
        for name in words & set(package.__all__):
            getattr(package, name)


def public_names() -> list[str]:
    """Names that ``import_named`` knows."""
    return [*modules.__all__, *datamodules.__all__]
