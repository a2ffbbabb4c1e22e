"""Finding the checkpoint that a run goes on from."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from .sharded_files import LEFTOVERS, is_whole, tidy


def newest_checkpoint(folders: Iterable[str | Path]) -> Path | None:
    """The newest whole ``.ckpt`` under any of the folders, across ``version_N``: a file, or a folder of shards.

    One that was cut off (a run killed while it saved) is passed over with a warning.
    """
    found = [path for folder in folders for path in Path(folder).rglob("*.ckpt") if _time(path)]
    for path in sorted(found, key=lambda path: (_time(path), str(path)), reverse=True):
        # torch writes a zip archive, whose directory comes last: without it the file is not whole.
        if is_whole(path) if path.is_dir() else zipfile.is_zipfile(path):
            return path
        rank_zero_warn(f"{path} is cut off: an older checkpoint is taken instead")
    return None


def remove_leftovers(folders: Iterable[str | Path]) -> None:
    """Takes away what saves that were killed have left under a run's folders, for which no other run saves."""
    for leftover in [path for folder in folders for path in Path(folder).rglob(LEFTOVERS)]:
        rank_zero_warn(f"{leftover} is what a save that was cut off has left: it is {tidy(leftover)}")


def _time(path: Path) -> int:
    """When a checkpoint was written, 0 where it is none. Of a folder its last file counts, not what was removed."""
    written = path / "meta.pt" if path.is_dir() else path
    return written.stat().st_mtime_ns if written.is_file() else 0
