"""Checkpoints that are there whole or not at all, also after a crash of the machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from .. import UsageError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes unsharded checkpoints beside their final place, syncs, and renames.

    Lightning stages them in ``$TMPDIR``, which on another file system ends in a copy, and syncs neither way. A run
    killed while it saves leaves the checkpoint before as it was, and perhaps a hidden temporary file, which the next
    save of that name removes. Remote paths (``s3://...``) are Lightning's, whose uploads are atomic.

    Use: ``Trainer(plugins=[AtomicCheckpointIO()])``; the command line has it built in.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves a checkpoint, whole or not at all.

        Raises:
            UsageError: The folder cannot be written, or its disk is full; the checkpoint before is still there.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            _write(checkpoint, target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
            raise UsageError(f"checkpoint {target} cannot be written: {str(error).splitlines()[0]}") from error


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are the owner's alone
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself, not only the bytes
    finally:
        os.close(folder)


def _remove_leftovers(target: Path) -> None:
    """Temporary files of saves of this name that were killed."""
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
