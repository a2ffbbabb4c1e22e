"""Suggest the nearest name that exists, for messages about one that does not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Return up to three of ``names`` spelled most like ``name``, best first."""
    return get_close_matches(name, sorted(set(names)), n=3, cutoff=0.5)


def closest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'dataset'?"``, or an empty string if no name is near."""
    best = get_close_matches(name, sorted(set(names)), n=1)
    return f"; did you mean {best[0]!r}?" if best else ""


def did_you_mean(path: Path) -> str:
    """Return ``"; did you mean data/prose?"`` for a path that does not exist, or an empty string if nothing is near."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if existing == path or not existing.is_dir():
        return ""
    missing, *rest = path.relative_to(existing).parts
    near = [existing.joinpath(name, *rest) for name in nearest(missing, os.listdir(existing))]
    found = [str(candidate) for candidate in near if candidate.exists()]
    return f"; did you mean {' or '.join(found)}?" if found else ""
