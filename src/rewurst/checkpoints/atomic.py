"""Save checkpoints completely or not at all, even if the machine crashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from .. import UsageError
from ..files import replacing
from .checksums import check_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes an unsharded file next to its final place, syncs and renames it.

    Lightning stages checkpoints in ``$TMPDIR``, which means a copy if that is another file system, and never syncs. A
    run killed while saving leaves the previous checkpoint unchanged, and perhaps a hidden temporary file, which the
    next save of that name removes. Lightning handles remote paths (``s3://...``), whose uploads are atomic.

    Use ``Trainer(plugins=[AtomicCheckpointIO()])``; the command line does so already.
    """

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint after checking its checksums.

        Raises:
            UsageError: The file has changed since it was saved, or is not complete.
        """
        if not Path(path).is_file():
            return super().load_checkpoint(path, *args, **kwargs)
        check_file(Path(path))
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except (OSError, RuntimeError, EOFError) as error:
            raise UsageError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint completely or not at all.

        Raises:
            UsageError: The folder cannot be written or its disk is full; the previous checkpoint is kept.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            with replacing(target) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
            raise UsageError(f"checkpoint {target} cannot be written: {str(error).splitlines()[0]}") from error


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of killed saves of this name."""
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
