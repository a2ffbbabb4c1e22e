"""Fixtures: a folder of pictures in several formats."""

from __future__ import annotations

from pathlib import Path

import pytest
from prepared_images import FORMATS, content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write twelve pictures in folders, three of each format, with captions."""
    root = tmp_path / "my pictures.d"
    for number in range(12):
        kind = FORMATS[number % 4]
        path = root / f"part{number // 6}" / f"{number:02d}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number, kind))
        path.with_suffix(".txt").write_text(f" picture {number}\n")
    return root
