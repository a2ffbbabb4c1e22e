"""Find the checkpoint that a run resumes from."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .. import UsageError
from .sharded_files import LEFTOVERS, is_whole, tidy
from .sharded_reading import describe_checkpoint

Content = Mapping[str, Any]


def newest_checkpoint(
    folders: Iterable[str | Path], belongs: Callable[[Content], bool] | None = None, resumable: bool = False
) -> Path | None:
    """Return the whole ``.ckpt`` with the latest step under any of the folders: a file, or a folder of shards.

    The step stored in a checkpoint decides, because copies lose their times; of several with the same step the one
    written last is taken. A checkpoint that was cut off is skipped with a warning.

    Args:
        folders: Folders to search, over all ``version_N``.
        belongs: Whether a checkpoint with these contents may be taken; tensors have no values.
        resumable: Skip checkpoints that contain only weights, which no run can resume from.
    """
    found = {path for folder in folders for path in Path(folder).rglob("*.ckpt") if _time(path)}
    steps: dict[Path, int] = {}
    only_weights = []
    # Of a checkpoint and a link to it a run resumes from the link: ModelCheckpoint never removes the file it came from.
    # Everybody else gets the file itself, so that it is not what is removed as an older one.
    order = sorted(found, key=lambda path: (_time(path), path.is_symlink() == resumable, str(path)), reverse=True)
    for path in order:
        content = describe(path)
        if content is None:
            rank_zero_warn(f"{path} is cut off: an older checkpoint is taken instead")
        elif resumable and "global_step" in content and "optimizer_states" not in content:
            only_weights.append(path)
        elif resumable and content and "global_step" not in content:
            rank_zero_info(f"{path} is not a Lightning checkpoint: skipped")
        elif belongs is None or belongs(content):
            steps[path] = content.get("global_step", -1)
    if only_weights:
        say = rank_zero_info if steps else rank_zero_warn
        say(f"{only_weights[0]} contains only weights, so there is no run to resume: skipped")
    if not steps:
        return None
    latest = next(iter(steps))
    best = max(steps, key=lambda path: steps[path])  # of equal ones the first, which was written last
    if steps[best] > steps[latest]:
        rank_zero_warn(f"{best} is at step {steps[best]} and taken, although {latest} at step {steps[latest]} is newer")
    return best


def describe(path: Path) -> Content | None:
    """Return a checkpoint's contents, its tensors without values, or None if it is not whole.

    A file that would need unpickling to be read has no contents that are known.
    """
    try:
        if path.is_dir():
            return describe_checkpoint(path) if is_whole(path) else None
        # torch writes a zip archive, whose directory comes last: without it the file is not whole.
        if not zipfile.is_zipfile(path):
            return None
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        return {}
    except (RuntimeError, UsageError):
        return None
    return content if isinstance(content, Mapping) else {}


def remove_leftovers(folders: Iterable[str | Path]) -> None:
    """Remove what saves that were killed have left under a run's folders, for which no other run saves."""
    for leftover in [path for folder in folders for path in Path(folder).rglob(LEFTOVERS)]:
        rank_zero_warn(f"{leftover} is what a save that was cut off has left: it is {tidy(leftover)}")


def _time(path: Path) -> int:
    """Return when a checkpoint was written, 0 if it is none. Of a folder its last file counts, not what was removed."""
    written = path / "meta.pt" if path.is_dir() else path
    return written.stat().st_mtime_ns if written.is_file() else 0
