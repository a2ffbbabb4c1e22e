"""Save checkpoints whole or not at all, also if the machine crashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from .. import UsageError
from ..files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write unsharded checkpoints next to their final place, sync, and rename.

    Lightning stages them in ``$TMPDIR``, which on another file system ends in a copy, and syncs neither way. A run
    killed while it saves leaves the checkpoint before as it was, and perhaps a hidden temporary file, which the next
    save of that name removes. Remote paths (``s3://...``) are Lightning's, whose uploads are atomic.

    Use: ``Trainer(plugins=[AtomicCheckpointIO()])``; the command line has it built in.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint, whole or not at all.

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
            with replacing(target) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
            raise UsageError(f"checkpoint {target} cannot be written: {str(error).splitlines()[0]}") from error


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of killed saves of this name."""
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
