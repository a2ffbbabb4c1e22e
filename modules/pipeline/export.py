"""Writing a cascade as a folder that diffusers loads."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import UsageError
from ..networks import VQGAN, Prior, SemanticCompressor, StageBUNet, TextEncoder, weight_files
from ..shared.text_encoder import checkpoint_text_encoder
from .folders import check_widths

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

    Models of the released compression (42.67 pixels per latent) and scale of z become one combined pipeline; others
    become two folders, ``prior`` and ``decoder``, because the combined pipeline has these numbers built in.

    Args:
        stage_a: Checkpoint of Stage A, the authors' file or a network's folder.
        stage_b: Checkpoint of Stage B; its Semantic Compressor is written too, if it has one.
        stage_c: Checkpoint of Stage C.
        out: Folder to write, new or empty.
        stage_c_mean: Second checkpoint of Stage C: the mean of both is written, which is how the release was made.
        text_encoder: Hub name or folder of Stage B's text encoder (default: the checkpoint's).
        prior_text_encoder: Hub name or folder of Stage C's text encoder (default: the checkpoint's, or Stage B's).
        resolution_multiple: Pixels on each side of a compressor latent (default: the compressor's, or 42.67).

    Raises:
        UsageError: A checkpoint is another stage's, broken or not finite; parts do not fit; ``out`` is taken.
    """
    root = Path(out)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UsageError(f"{root} exists already: give a new folder")
    prior = Prior.from_checkpoint(stage_c)
    if stage_c_mean is not None:
        other = Prior.from_checkpoint(stage_c_mean)
        weight_files.check(other.state_dict(), prior.state_dict(), "Prior", str(stage_c_mean))
        prior.load_state_dict(weight_files.mean([prior.state_dict(), other.state_dict()]))
    lower = text_encoder or checkpoint_text_encoder(stage_b)
    upper = prior_text_encoder or checkpoint_text_encoder(stage_c) or lower
    decoder = StageBUNet.from_checkpoint(stage_b)
    if lower is None and upper is not None and _is_blind(decoder):
        lower = upper
    if lower is None or upper is None:
        raise UsageError(f"{stage_b} names no text encoder: give text_encoder, a hub name or a folder")
    encoders = [one if isinstance(one, TextEncoder) else TextEncoder.from_pretrained(one) for one in (lower, upper)]
    _set_scale(prior, stage_c)
    if _is_blind(decoder):
        decoder = _for_states(decoder, encoders[0], stage_b)
    cascade: dict[str, Any] = {
        "vqgan": VQGAN.from_checkpoint(stage_a),
        "decoder": decoder,
        "prior": prior,
        "text_encoder": encoders[0],
        "prior_text_encoder": encoders[1],
        "compressor": _compressor(stage_b),
    }
    check_widths(cascade, str(root))
    if resolution_multiple is None:
        resolution_multiple = cascade["compressor"].pixels_per_latent if cascade["compressor"] else 42.67
    write_cascade(root, resolution_multiple=resolution_multiple, **cascade)
    return root


def _is_blind(decoder: StageBUNet) -> bool:
    """Say whether Stage B was trained without text: then nothing of it passes its mapper."""
    return not bool(decoder.get_parameter("clip_mapper.weight").any())


def _for_states(decoder: StageBUNet, encoder: TextEncoder, stage_b: str | Path) -> StageBUNet:
    """Let a Stage B that is blind to text take the states of any encoder; how many there are does matter to it.

    Raises:
        UsageError: It was trained with more or fewer.
    """
    length = weight_files.read_file(stage_b).get("text_length") if weight_files.is_one_file(stage_b) else None
    if length is not None and length != encoder.length:
        raise UsageError(
            f"{stage_b} was trained without text, with text_length {length}, and the text encoder gives "
            f"{encoder.length} states: train Stage B with text_length {encoder.length}, or give another encoder"
        )
    state = decoder.state_dict()
    state["clip_mapper.weight"] = state["clip_mapper.weight"].new_zeros(len(state["clip_mapper.weight"]), encoder.width)
    return StageBUNet.from_weights({**decoder.config, "clip_embd": encoder.width}, state, str(stage_b))


def _set_scale(prior: Prior, stage_c: str | Path) -> None:
    """Take over the scale of z that Stage C was trained with, where its checkpoint says it."""
    scale = weight_files.read_file(stage_c).get("latent_scale", {}) if weight_files.is_one_file(stage_c) else {}
    prior.latent_mean = scale.get("latent_mean", prior.latent_mean)
    prior.latent_std = scale.get("latent_std", prior.latent_std)


def _compressor(checkpoint: str | Path) -> SemanticCompressor | None:
    """Return the compressor that was trained with Stage B, if the checkpoint holds it."""
    if not weight_files.is_one_file(checkpoint):
        return None
    content = weight_files.read_file(checkpoint)
    held = [entry["class"] for entry in content.get("networks", {}).values()]
    if "SemanticCompressor" in held or weight_files.AUTHORS_FILES["SemanticCompressor"] in content:
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
    released = (Prior.latent_mean, Prior.latent_std)
    combined = resolution_multiple == 42.67 and vqgan.compression == 4
    combined &= (prior.latent_mean, prior.latent_std) == released
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
