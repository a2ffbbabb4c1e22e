"""Finding the checkpoint that a run goes on from."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn


def newest_checkpoint(folders: Iterable[str | Path]) -> Path | None:
    """The newest whole ``.ckpt`` file under any of the folders, across ``version_N``.

    A file that was cut off (a run killed while it saved) is passed over with a warning.
    """
    found = [path for folder in folders for path in Path(folder).rglob("*.ckpt") if path.is_file()]
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True):
        # torch writes a zip archive, whose directory comes last: without it the file is not whole.
        if zipfile.is_zipfile(path):
            return path
        rank_zero_warn(f"{path} is cut off: an older checkpoint is taken instead")
    return None
