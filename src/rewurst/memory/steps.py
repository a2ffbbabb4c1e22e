"""What is trained by a config and what a step of it computes, as far as memory goes: no file of weights is needed.

Networks are built from the config's settings, under :func:`.simulation.without_memory`. Frozen networks are
taken from the files that the config names, where these are there, else to be the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import UsageError
from ..modules.causal_lm import CausalLM
from ..modules.losses.cross_entropy import chunk_size
from ..modules.networks import VQGAN, Prior, SemanticCompressor, StageBUNet, diffusion
from ..modules.networks.base import Network, build
from ..modules.optimizers.choice import STAGES, OptimizerName, make_optimizer

Settings = Mapping[str, Any]
CLIP_LAYERS = {768: 12, 1024: 24, 1280: 32}
"""Of CLIP's text models by their width: ViT-L/14, ViT-H/14 and ViT-bigG/14."""


@dataclass
class Planned:
    """A module as it trains.

    Attributes:
        module: What has parameters; also networks that are frozen and part of it.
        loss: Of a micro-batch of so many samples.
        optimizers: Over its parameters.
        beside: Bytes of frozen networks that are no part of it, by name.
        logits: Bytes of the logits of so many samples that are there at a time, with what is computed of them.
        logits_stay: Whether they stay for the backward pass.
        sample: What a sample is.
        notes: What had to be assumed.
    """

    module: nn.Module
    loss: Callable[[int], Tensor]
    optimizers: list[Optimizer]
    sample: str
    beside: dict[str, int] = field(default_factory=dict)
    logits: Callable[[int], int] = lambda micro_batch_size: 0
    logits_stay: bool = False
    notes: list[str] = field(default_factory=list)


def planned(model: Settings, data: Settings, mixed: bool, image_size: int | None = None) -> Planned:
    """Builds what a config trains, without memory.

    Args:
        model: ``class_path`` and ``init_args`` of the module.
        data: The same of the data module.
        mixed: Whether products are in bfloat16.
        image_size: Of the images that latents were made of, where the config does not say.

    Raises:
        UsageError: A module that is none of ours.
    """
    name = model["class_path"].rsplit(".", 1)[-1]
    builders = {"CausalLM": _causal_lm, "StageA": _stage_a, "StageB": _stage_b, "StageC": _stage_c}
    if name not in builders:
        raise UsageError(f"plan knows {', '.join(builders)}; what a step of {name} computes is not known to it")
    settings = {**data.get("init_args", {}), "kind": data["class_path"].rsplit(".", 1)[-1]}
    if image_size is not None:
        settings["image_size"] = image_size
    return builders[name](model["init_args"], settings, mixed)


def _causal_lm(model: Settings, data: Settings, mixed: bool) -> Planned:
    from transformers import AutoConfig

    if "sequence_length" not in data:
        raise UsageError(f"data {data['kind']} has no sequence_length, which CausalLM's memory depends on")
    given = model["model"]
    settings = given if isinstance(given, dict) else AutoConfig.from_pretrained(given).to_dict()
    own = {key: model[key] for key in ("z_loss", "document_masks") if key in model}
    module = CausalLM(settings, optimizer=_choice(model["optimizer"]), **own)
    length = data["sequence_length"]
    head: Any = module.model.get_output_embeddings()  # type: ignore[operator]
    vocabulary, width = head.weight.shape
    plain = module._find_head()
    # fp32 is worked on in place; bf16 logits are widened for the softmax and narrowed again
    itemsize = 8 if mixed else 4

    def logits(rows: int) -> int:
        tokens = rows * length
        if plain:
            return int(min(tokens, chunk_size(vocabulary, width)) * vocabulary * itemsize)
        return int(tokens * vocabulary * (2 if mixed else 4))

    def loss(rows: int) -> Tensor:
        with _rows_of_one_sequence():
            return module.loss(torch.zeros(rows, length + 1, dtype=torch.long))

    return Planned(
        module,
        loss,
        [module.configure_optimizers()],
        f"rows of {length} tokens",
        logits=logits,
        logits_stay=not plain,
    )


@contextmanager
def _rows_of_one_sequence() -> Iterator[None]:
    """Has transformers make no mask, as for real rows: of tensors without values it takes positions to begin anew."""
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _stage_a(model: Settings, data: Settings, mixed: bool) -> Planned:
    from torchvision.models import vgg16

    from ..modules.losses.perceptual import LPIPS
    from ..modules.shared.frozen import Frozen
    from ..modules.stage_a import StageA

    drop = ("init_from", "perceptual_weight", "download_vgg16", "vgg16", "optimizer", "discriminator_optimizer")
    options = {key: value for key, value in model.items() if key not in drop}
    both = {key: _choice(model[key]) for key in ("optimizer", "discriminator_optimizer")}
    module = StageA(perceptual_weight=0.0, **both, **options)
    module._observe = lambda latents, indices: None  # type: ignore[method-assign]  # it looks at values
    module.step, side = module.adversarial_start, _image_size(data)  # from when on the discriminator takes part
    beside = {}
    if model["perceptual_weight"]:
        module.lpips = Frozen(LPIPS(vgg16()), "VGG16")
        module.perceptual_weight = model["perceptual_weight"]
        beside["VGG16"] = _bytes(module.lpips.module)

    def loss(images: int) -> Tensor:
        module._window.append({})
        return torch.stack(list(module._losses(_images(images, side)).values())).sum()

    return Planned(module, loss, module.configure_optimizers(), f"images of {side} pixels", beside)


def _stage_b(model: Settings, data: Settings, mixed: bool) -> Planned:
    notes: list[str] = []
    unet, compressor = build(StageBUNet, model["unet"]), build(SemanticCompressor, model["compressor"])
    module, side = nn.ModuleDict({"unet": unet, "compressor": compressor}), _image_size(data)
    stage_a = _frozen(VQGAN, model["stage_a"], notes)
    beside = {"Stage A": _bytes(stage_a)}
    width, length = unet.config["clip_embd"], model.get("text_length", 77)
    if model.get("text_encoder") is None:
        unet.clip_mapper.weight.requires_grad_(False)
    else:
        length, beside["text encoder"] = 77, _text_encoder_bytes(width, notes)

    def loss(images: int) -> Tensor:
        pixels = _images(images, side)["image"].float() / 255
        with torch.no_grad():
            latents = stage_a.to_latents(pixels).float()
        z, t = compressor(pixels).float(), torch.rand(images)
        noise = torch.randn_like(latents)
        predicted = unet(diffusion.diffuse(latents, t, noise), t, z, torch.zeros(images, length, width)).float()
        return (predicted - noise).square().mean()  # type: ignore[no-any-return]

    optimizer = make_optimizer(_choice(model["optimizer"]), STAGES, module)
    return Planned(module, loss, [optimizer], f"images of {side} pixels", beside, notes=notes)


def _stage_c(model: Settings, data: Settings, mixed: bool) -> Planned:
    if isinstance(model.get("text_encoder"), dict):
        raise UsageError("plan does not know Stage C with a text encoder that is trained along: name a frozen one")
    notes: list[str] = []
    module = build(Prior, model["prior"])
    compressor = _frozen(SemanticCompressor, model["stage_b"], notes)
    side, beside, prepared = _image_size(data), {}, data["kind"] == "LatentDataModule"
    if prepared:
        notes.append("latents are taken to have been prepared with text states")
    else:
        beside["compressor"] = _bytes(compressor)
        beside["text encoder"] = _text_encoder_bytes(module.config["c_cond"], notes)
    with torch.no_grad():
        shape = compressor.eval()(torch.zeros(1, 3, side, side)).shape[1:]

    def loss(samples: int) -> Tensor:
        if prepared:
            x = torch.zeros(samples, *shape)
        else:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                x = compressor(_images(samples, side)["image"].float() / 255)
        t, noise, text = torch.rand(samples), torch.randn_like(x), torch.zeros(samples, 77, module.config["c_cond"])
        predicted = module(diffusion.diffuse(x, t, noise), t, text).float()
        weight = diffusion.p2_weight(t)[:, None, None, None]
        return ((predicted - noise).square() * weight).mean()  # type: ignore[no-any-return]

    optimizer = make_optimizer(_choice(model["optimizer"]), STAGES, module)
    of = "x".join(str(size) for size in shape)
    return Planned(module, loss, [optimizer], f"latents of {of} ({side} pixels)", beside, notes=notes)


def _choice(given: Any) -> Any:
    """A config's optimizer: a name, or what makes it."""
    if given is None:
        return "adamw"
    if isinstance(given, str) and given in get_args(OptimizerName):
        return given
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=OptimizerCallable)
    return parser.instantiate(parser.parse_object({"it": given})).it


def _frozen(kind: type[Network], path: str, notes: list[str]) -> Any:
    """A frozen network: a checkpoint's, else the paper's."""
    if Path(path).exists():
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            config = kind.from_checkpoint(path).config
        return kind.from_config(config).eval().requires_grad_(False)
    notes.append(f"there is no {path}: its {kind.__name__} is taken to be the paper's")
    return kind.from_preset("paper").eval().requires_grad_(False)


def _text_encoder_bytes(width: int, notes: list[str]) -> int:
    """A CLIP text model in float32, by its width."""
    layers = CLIP_LAYERS.get(width)
    if layers is None:
        notes.append(f"the text encoder of width {width} is none of CLIP's: its weights are not counted")
        return 0
    return 4 * ((49408 + 77 + 2) * width + layers * (12 * width**2 + 13 * width))


def _image_size(data: Settings) -> int:
    side = data.get("image_size")
    if side is None:
        raise UsageError("the config does not say how large images are: give --image_size, such as 512")
    return int(side)


def _images(count: int, side: int) -> dict[str, Any]:
    return {"image": torch.zeros(count, 3, side, side, dtype=torch.uint8), "caption": [""] * count}


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
