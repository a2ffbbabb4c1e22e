"""Find the checkpoint to resume a run from."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .. import UsageError
from .checksums import check_file
from .sharded_files import LEFTOVERS, is_whole, tidy
from .sharded_reading import describe_checkpoint

Content = Mapping[str, Any]


def newest_checkpoint(
    folders: Iterable[str | Path], belongs: Callable[[Content], bool] | None = None, resumable: bool = False
) -> Path | None:
    """Return the complete ``.ckpt`` file or folder of shards with the latest step under any of the folders.

    The step stored in a checkpoint decides, because copies lose their times. Of several with the same step, the one
    written last is taken. A truncated or damaged checkpoint is skipped with a warning.

    Args:
        folders: Folders to search, including all ``version_N``.
        belongs: Predicate on a checkpoint's contents (with tensors without values) that accepts or skips it.
        resumable: Whether to skip checkpoints that contain only weights, from which no run can resume.
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
            rank_zero_warn(f"{path} is truncated: an older checkpoint is used instead")
        elif resumable and "global_step" in content and "optimizer_states" not in content:
            only_weights.append(path)
        elif resumable and content and "global_step" not in content:
            rank_zero_info(f"{path} is not a Lightning checkpoint: skipped")
        elif belongs is None or belongs(content):
            steps[path] = content.get("global_step", -1)
    if only_weights:
        say = rank_zero_info if steps else rank_zero_warn
        say(f"{only_weights[0]} contains only weights, so there is no run to resume: skipped")
    while steps:
        latest = next(iter(steps))
        best = max(steps, key=lambda path: steps[path])  # of equal ones the first, which was written last
        if damage := _damage(best):
            rank_zero_warn(f"{damage}: an older checkpoint is used instead")
            del steps[best]
            continue
        if steps[best] > steps[latest]:
            rank_zero_warn(f"{best} at step {steps[best]} is used, although {latest} at step {steps[latest]} is newer")
        return best
    return None


def _damage(path: Path) -> str:
    """Return what is wrong with a checkpoint's file, empty if nothing is."""
    try:
        for file in [path] if path.is_file() else sorted(path.glob("*.pt")):
            check_file(file)
    except UsageError as error:
        return str(error)
    return ""


def describe(path: Path) -> Content | None:
    """Return a checkpoint's contents with tensors without values, or None if it is incomplete.

    The contents of a file that would need unpickling are unknown, so an empty dict is returned.
    """
    try:
        if path.is_dir():
            return describe_checkpoint(path) if is_whole(path) else None
        # torch writes a zip archive, whose directory comes last: without it the file is incomplete.
        if not zipfile.is_zipfile(path):
            return None
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        return {}
    except (RuntimeError, UsageError):
        return None
    return content if isinstance(content, Mapping) else {}


def remove_leftovers(folders: Iterable[str | Path]) -> None:
    """Remove leftovers of killed saves under a run's folders, in which no other run saves."""
    for leftover in [path for folder in folders for path in Path(folder).rglob(LEFTOVERS)]:
        rank_zero_warn(f"{leftover} was left by an interrupted save: {tidy(leftover)}")


def _time(path: Path) -> int:
    """Return the time at which a checkpoint was written, 0 if it is not one. Of a folder, the last file counts."""
    written = path / "meta.pt" if path.is_dir() else path
    return written.stat().st_mtime_ns if written.is_file() else 0
