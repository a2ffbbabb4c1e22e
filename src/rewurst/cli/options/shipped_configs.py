"""Find the recipes that come with the package: ``configs/...`` means the same in every folder."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[2]


def with_shipped_configs(args: list[str]) -> list[str]:
    """Replace the paths of configs that are not here by those of the package's own.

    Args:
        args: Arguments of a command line.
    """
    found = []
    for before, arg in zip(["", *args], args, strict=False):
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c") and equals:
            found.append(f"{option}={_shipped(value)}")
        else:
            found.append(_shipped(arg) if before in ("--config", "-c") else arg)
    return found


def _shipped(path: str) -> str:
    there = PACKAGE / path
    is_recipe = path.startswith("configs/") and not Path(path).exists() and there.is_file()
    return str(there) if is_recipe else path
