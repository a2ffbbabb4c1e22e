"""Write the adapters of a Stage C that was trained with LoRA as a file that diffusers loads."""

from __future__ import annotations

from pathlib import Path

from ... import UsageError
from ..networks import weight_files
from ..networks.lora import write_lora


def export_lora(checkpoint: str | Path, out: str | Path) -> int:
    """Write the adapters of Stage C for diffusers' ``WuerstchenPriorPipeline.load_lora_weights``.

    Args:
        checkpoint: Checkpoint of a Stage C that was trained with LoRA.
        out: Folder to write, new or empty.

    Returns:
        Number of layers that the adapters change.

    Raises:
        UsageError: The checkpoint cannot be read or has no adapters, or ``out`` is taken.
    """
    root = Path(out)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root} exists already: give a new folder")
    content = weight_files.read_file(checkpoint)
    for attribute, entry in content.get("networks", {}).items():
        if entry["class"] == "Prior" and "lora" in entry:
            prefix, state = f"{attribute}.", content["state_dict"]
            own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            return write_lora(root, own, entry["lora"], "prior")
    raise UsageError(f"{checkpoint} has no LoRA adapters of Stage C: train it with lora, or use export diffusers")
