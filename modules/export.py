"""Writing a cascade as a folder that diffusers loads."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import UsageError
from . import weights
from .folders import check_widths
from .networks import VQGAN, Prior, SemanticCompressor, StageBUNet, TextEncoder

CLASSES = "from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior\n"
"""What diffusers executes when it is allowed to: its own loader looks for the classes where they no longer are."""

README = """---
library_name: diffusers
---
# A Würstchen cascade

With rewurst: `rewurst generate image FOLDER "a prompt" --out picture.png`, or
`rewurst.modules.TextToImage.from_folder(FOLDER)("a prompt").images`.

With diffusers (0.42 finds its Würstchen classes only through the one-line `wuerstchen.py` files here, which is what
`trust_remote_code` is for):

```python
{how}
```
"""

COMBINED = """from diffusers import AutoPipelineForText2Image
pipeline = AutoPipelineForText2Image.from_pretrained(FOLDER, trust_remote_code=True)
images = pipeline("a prompt").images"""

PAIR = """from diffusers import DiffusionPipeline
prior = DiffusionPipeline.from_pretrained(FOLDER + "/prior", trust_remote_code=True)
decoder = DiffusionPipeline.from_pretrained(FOLDER + "/decoder", trust_remote_code=True)
embeddings = prior("a prompt", height={size}, width={size}).image_embeddings
images = decoder(embeddings, prompt="a prompt").images"""


def export_diffusers(
    stage_a: str | Path,
    stage_b: str | Path,
    stage_c: str | Path,
    out: str | Path,
    stage_c_mean: str | Path | None = None,
    text_encoder: str | Path | None = None,
    prior_text_encoder: str | Path | None = None,
    resolution_multiple: float | None = None,
) -> Path:
    """Write a folder that diffusers and ``TextToImage`` load, and a README that says how.

    Models of the released compression (42.67 pixels a latent) become one combined pipeline; others become two folders,
    ``prior`` and ``decoder``, because the combined pipeline has that number built in.

    Args:
        stage_a: Checkpoint of ours, the authors' file or a network's folder; so are the next two.
        stage_b: If it holds the Semantic Compressor too, that is written as well, for reconstructions.
        stage_c: See ``stage_a``.
        out: Must not exist, or be empty.
        stage_c_mean: A second checkpoint of Stage C: the mean of both is written, which is how the release was made.
        text_encoder: Of Stage B: a hub name or folder; by default what the checkpoint names as "text_encoder".
        prior_text_encoder: The same of Stage C; by default Stage C's own, or else Stage B's.
        resolution_multiple: Pixels on each side of a compressor latent; by default the compressor's, or else 42.67.

    Raises:
        UsageError: A checkpoint is another stage's, broken or not finite; parts do not fit; ``out`` is taken.
    """
    root = Path(out)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root} exists already: give a new folder")
    prior = Prior.from_checkpoint(stage_c)
    if stage_c_mean is not None:
        other = Prior.from_checkpoint(stage_c_mean)
        weights.check(other.state_dict(), prior.state_dict(), "Prior", str(stage_c_mean))
        prior.load_state_dict(weights.mean([prior.state_dict(), other.state_dict()]))
    lower = text_encoder or _named_text_encoder(stage_b)
    upper = prior_text_encoder or _named_text_encoder(stage_c) or lower
    if lower is None:
        raise UsageError(f"{stage_b} names no text encoder: give text_encoder, a hub name or a folder")
    assert upper is not None
    cascade: dict[str, Any] = {
        "vqgan": VQGAN.from_checkpoint(stage_a),
        "decoder": StageBUNet.from_checkpoint(stage_b),
        "prior": prior,
        "text_encoder": TextEncoder.from_pretrained(lower),
        "prior_text_encoder": TextEncoder.from_pretrained(upper),
        "compressor": _compressor(stage_b),
    }
    check_widths(cascade, str(root))
    if resolution_multiple is None:
        resolution_multiple = cascade["compressor"].pixels_per_latent if cascade["compressor"] else 42.67
    write_cascade(root, resolution_multiple=resolution_multiple, **cascade)
    return root


def _named_text_encoder(checkpoint: str | Path) -> str | None:
    if not weights.is_one_file(checkpoint):
        return None
    named = weights.read_file(checkpoint).get("text_encoder")
    return named if isinstance(named, str) else None


def _compressor(checkpoint: str | Path) -> SemanticCompressor | None:
    """Return the compressor that was trained with Stage B, if the checkpoint holds it."""
    if not weights.is_one_file(checkpoint):
        return None
    content = weights.read_file(checkpoint)
    held = [entry["class"] for entry in content.get("networks", {}).values()]
    if "SemanticCompressor" in held or weights.AUTHORS_FILES["SemanticCompressor"] in content:
        return SemanticCompressor.from_checkpoint(checkpoint)
    return None


def write_cascade(
    out: Path,
    vqgan: VQGAN,
    decoder: StageBUNet,
    prior: Prior,
    text_encoder: TextEncoder,
    prior_text_encoder: TextEncoder,
    compressor: SemanticCompressor | None = None,
    resolution_multiple: float = 42.67,
) -> None:
    """Write networks as ``export_diffusers`` does."""
    combined = resolution_multiple == 42.67 and vqgan.compression == 4
    below, above, stem = (out, out, "prior_") if combined else (out / "decoder", out / "prior", "")
    for network, folder in ((vqgan, below / "vqgan"), (decoder, below / "decoder"), (prior, above / f"{stem}prior")):
        network.save(folder)
        (folder / "wuerstchen.py").write_text(CLASSES)
    text_encoder.save(below / "text_encoder", below / "tokenizer")
    prior_text_encoder.save(above / f"{stem}text_encoder", above / f"{stem}tokenizer")
    if compressor is not None:
        compressor.save(out / "compressor")
    lower = _common(below, text_encoder, "") | {
        "vqgan": ["wuerstchen", "PaellaVQModel"],
        "decoder": ["wuerstchen", "WuerstchenDiffNeXt"],
    }
    upper = _common(above, prior_text_encoder, stem) | {f"{stem}prior": ["wuerstchen", "WuerstchenPrior"]}
    if combined:
        _write_index(out, "WuerstchenCombinedPipeline", lower | upper)
    else:
        scale = {"latent_dim_scale": resolution_multiple / vqgan.compression}
        numbers = {"latent_mean": prior.latent_mean, "latent_std": prior.latent_std}
        numbers["resolution_multiple"] = resolution_multiple
        _write_index(below, "WuerstchenDecoderPipeline", lower | scale)
        _write_index(above, "WuerstchenPriorPipeline", upper | numbers)
    how = COMBINED if combined else PAIR.format(size=round(12 * resolution_multiple))
    (out / "README.md").write_text(README.format(how=how))


def _common(folder: Path, text_encoder: TextEncoder, stem: str) -> dict[str, Any]:
    """Write the scheduler; return the index entries that every pipeline has."""
    scheduler = folder / f"{stem}scheduler"
    scheduler.mkdir(parents=True, exist_ok=True)
    settings = {"_class_name": "DDPMWuerstchenScheduler", "s": 0.008, "scaler": 1.0}
    (scheduler / "scheduler_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return {
        f"{stem}scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
        f"{stem}text_encoder": ["transformers", type(text_encoder.model).__name__],
        f"{stem}tokenizer": ["transformers", type(text_encoder.tokenizer).__name__],
    }


def _write_index(folder: Path, pipeline: str, entries: dict[str, Any]) -> None:
    index = {"_class_name": pipeline, "_diffusers_version": _diffusers_version(), **entries}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _diffusers_version() -> str:
    try:
        return metadata.version("diffusers")
    except metadata.PackageNotFoundError:
        return "0.42.1"  # the version that the folder's format was tried with
