"""Folders that hold a whole cascade: our exports and the hub's layout."""

from pathlib import Path
from typing import Any

import torch

from ... import UsageError
from ..networks import VQGAN, Network, Prior, SemanticCompressor, StageBUNet, TextEncoder, weight_files


def _part(folder: Path, name: str) -> Path:
    if not (folder / name).is_dir():
        raise UsageError(f"{folder} lacks its part {name}: export or download it again")
    return folder / name


def read_cascade(
    folder: str | Path, prior: str | Path | None, dtype: torch.dtype | None, variant: str | None = None
) -> dict[str, Any]:
    """Load all networks of a cascade; keys are the arguments of ``TextToImage``.

    Args:
        folder: A combined pipeline's; or one with ``prior`` and ``decoder`` in it; or a decoder pipeline's.
        prior: In the last case, the prior pipeline's.
        dtype: Of the networks.
        variant: Variant of the files to prefer, such as ``fp16``.

    Raises:
        UsageError: Something is missing or does not belong together.
    """
    root = Path(folder)
    below, above, stem = _pipelines(root, prior)
    lower, upper = (weight_files.read_json(pipeline / "model_index.json") for pipeline in (below, above))
    if below == above and lower.get("_class_name") != "WuerstchenCombinedPipeline":
        raise UsageError(f"{root} holds a {lower.get('_class_name')} only: give the prior pipeline's folder as prior")
    _check_scheduler(below / "scheduler")
    _check_scheduler(above / f"{stem}scheduler")
    compressor = root / "compressor"
    cascade = {
        "vqgan": VQGAN.from_folder(_part(below, "vqgan"), dtype, variant),
        "decoder": StageBUNet.from_folder(_part(below, "decoder"), dtype, variant),
        "prior": Prior.from_folder(_part(above, f"{stem}prior"), dtype, variant),
        "text_encoder": _text_encoder(below, "", dtype, variant),
        "prior_text_encoder": _text_encoder(above, stem, dtype, variant),
        "compressor": SemanticCompressor.from_folder(compressor, dtype, variant) if compressor.is_dir() else None,
    }
    check_widths(cascade, str(root))
    numbers = ("resolution_multiple", "latent_mean", "latent_std", "latent_dim_scale")
    return cascade | {name: float(index[name]) for index in (upper, lower) for name in numbers if name in index}


def _pipelines(root: Path, prior: str | Path | None) -> tuple[Path, Path, str]:
    """Return the decoder pipeline's folder, the prior pipeline's, and how names of the latter's parts begin."""
    if (root / "prior" / "model_index.json").is_file():
        return root / "decoder", root / "prior", ""
    return (root, root, "prior_") if prior is None else (root, Path(prior), "")


def _check_scheduler(folder: Path) -> None:
    """Refuse other schedules than ours."""
    path = folder / "scheduler_config.json"
    settings = weight_files.read_json(path) if path.is_file() else {}
    scaler, s = settings.get("scaler", 1.0), settings.get("s", 0.008)
    if (scaler, s) != (1.0, 0.008):
        raise UsageError(f"{path} asks for scaler {scaler} and s {s}: only 1.0 and 0.008 are supported")


def _text_encoder(folder: Path, stem: str, dtype: torch.dtype | None, variant: str | None) -> TextEncoder:
    model, tokenizer = _part(folder, f"{stem}text_encoder"), _part(folder, f"{stem}tokenizer")
    return TextEncoder.from_pretrained(model.resolve(), tokenizer.resolve(), variant).to(dtype=dtype)


def check_widths(cascade: dict[str, Any], where: str) -> None:
    """Refuse networks that do not fit together.

    Raises:
        UsageError: Names the first two that do not.
    """
    config = {name: part.config for name, part in cascade.items() if isinstance(part, Network)}
    pairs = [
        ("Stage B's c_in", config["decoder"]["c_in"], "Stage A's latent_channels", config["vqgan"]["latent_channels"]),
    ]
    if any(config["decoder"]["inject_effnet"]):  # otherwise no level sees what Stage C draws
        embeddings = config["decoder"]["effnet_embd"], "Stage C's c_in", config["prior"]["c_in"]
        pairs.append(("Stage B's effnet_embd", *embeddings))
    for stage, argument, encoder in (
        ("decoder", "clip_embd", "text_encoder"),
        ("prior", "c_cond", "prior_text_encoder"),
    ):
        pairs.append((f"{stage}'s {argument}", config[stage][argument], f"{encoder}'s width", cascade[encoder].width))
    for one, value, other, needed in pairs:
        if value != needed:
            raise UsageError(f"{where}: {one} is {value} but {other} is {needed}: these parts do not belong together")
