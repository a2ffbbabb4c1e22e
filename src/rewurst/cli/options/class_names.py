"""Names of the package's classes in YAML and on the command line: short ones, and paths of earlier versions.

The parser finds short names among the classes that are imported. Importing all of them would make a language model
wait for torchvision and an image model for the tokenizers.
"""

from __future__ import annotations

import re
from pathlib import Path

from ... import callbacks, datamodules, modules

_INNER_PATH = re.compile(r"\brewurst\.(callbacks|datamodules|modules)(?:\.[a-z]\w*)+\.([A-Z]\w*)")


def import_named(args: list[str]) -> None:
    """Import the modules and data modules that the arguments, or the YAML files among them, name.

    Args:
        args: Arguments of a command line.
    """
    words = set(re.findall(r"\w+", " ".join(args)))
    for arg in args:
        path = Path(arg.partition("=")[2] or arg)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            words |= set(re.findall(r"\w+", path.read_text("utf8", "replace")))
    for package in (modules, datamodules):
        for name in words & set(package.__all__):
            getattr(package, name)


def public_names() -> list[str]:
    """Return the names that ``import_named`` knows."""
    return [*modules.__all__, *datamodules.__all__]


def with_public_paths(text: str) -> str:
    """Replace the file that defines a public class by the package that exports it.

    Configs written by hand for earlier versions name files that have moved since:
    ``rewurst.callbacks.lr_rewarming.LRRewarming`` becomes ``rewurst.callbacks.LRRewarming``.

    Args:
        text: YAML, or an argument of a command line.
    """
    exported = {package.__name__: set(package.__all__) for package in (callbacks, datamodules, modules)}

    def public(path: re.Match[str]) -> str:
        package, name = f"rewurst.{path[1]}", path[2]
        return f"{package}.{name}" if name in exported[package] else path[0]

    return _INNER_PATH.sub(public, text)
