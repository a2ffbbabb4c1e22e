"""Weight files of the Würstchen networks: rewurst's and diffusers' (with the same names), and the authors'.

Reading never executes code: it uses safetensors or ``torch.load(weights_only=True)``.
"""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ... import UsageError
from ...checkpoints.checksums import check_file
from ...checkpoints.sharded_files import is_sharded
from ...hints import did_you_mean

WEIGHTS = "diffusion_pytorch_model"
"""Stem of diffusers' weight files."""

WEIGHT_SUFFIXES = (".safetensors", ".bin")

MARKS = {
    "vquantizer.embedding.weight": ("VQGAN", "Stage A"),
    "clip_mapper.weight": ("StageBUNet", "Stage B"),
    "cond_mapper.0.weight": ("Prior", "Stage C"),
    "mapper.1.running_mean": ("SemanticCompressor", "the Semantic Compressor"),
    "encoder.0.parametrizations.weight.original": ("PatchDiscriminator", "Stage A's discriminator"),
}
"""A tensor name that only one network has, that network's class, and its name in messages."""

AUTHORS_FILES = {
    "VQGAN": "state_dict",  # vqgan_f4_v1_500k.pt
    "StageBUNet": "state_dict",  # model_v2_stage_b.pt
    "SemanticCompressor": "effnet_state_dict",  # model_v2_stage_b.pt
    "Prior": "ema_state_dict",  # model_v3_stage_c.pt
}
"""The key of each network in the authors' files."""

AUTHORS_NAMES = {
    "vquantizer.codebook.weight": "vquantizer.embedding.weight",
    "attention.attn.out_proj.weight": "attention.to_out.0.weight",
    "attention.attn.out_proj.bias": "attention.to_out.0.bias",
}
"""Suffixes of the authors' names and of ours; all names that are not listed here or below are the same."""

AUTHORS_FUSED = {
    f"attention.attn.in_proj_{kind}": [f"attention.to_{part}.{kind}" for part in "qkv"] for kind in ("weight", "bias")
}
"""Suffixes of the authors' names for three of our tensors, stacked."""


def _end(name: str, ends: Iterable[str]) -> str | None:
    """Return the one of ``ends`` with which the dotted name ends."""
    return next((end for end in ends if name == end or name.endswith(f".{end}")), None)


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' tensors to ours and split their fused projections; our own names stay unchanged."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if end := _end(name, AUTHORS_NAMES):
            ours[name.removesuffix(end) + AUTHORS_NAMES[end]] = tensor
        elif end := _end(name, AUTHORS_FUSED):
            parts = zip(AUTHORS_FUSED[end], tensor.chunk(3), strict=True)
            ours |= {name.removesuffix(end) + new: part for new, part in parts}
        else:
            ours[name] = tensor
    return ours


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors to the authors' and fuse their projections."""
    renamed = {ours: authors for authors, ours in AUTHORS_NAMES.items()}
    stacked = {parts[0]: authors for authors, parts in AUTHORS_FUSED.items()}
    rest = [part for parts in AUTHORS_FUSED.values() for part in parts[1:]]
    authors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if end := _end(name, renamed):
            authors[name.removesuffix(end) + renamed[end]] = tensor
        elif end := _end(name, stacked):
            stem, fused = name.removesuffix(end), stacked[end]
            authors[stem + fused] = torch.cat([state[stem + part] for part in AUTHORS_FUSED[fused]])
        elif not _end(name, rest):
            authors[name] = tensor
    return authors


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a .safetensors, .pt, .bin or .ckpt file, or a sharded checkpoint, whose tensors are assembled.

    Raises:
        UsageError: The file is missing, broken, or contains pickled objects other than tensors and plain values.
    """
    path = Path(path)
    if is_sharded(path):
        from ...checkpoints.sharded_reading import read_checkpoint  # plain networks do not need Lightning

        return read_checkpoint(path)
    if not path.is_file():
        hint = did_you_mean(path) or ": give a .safetensors, .pt or .ckpt file with weights"
        raise UsageError(f"{path} is not a file{hint}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        check_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning about pickle precedes the error below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a pickled {found[1]}" if found else "data that only unpickling can read"
        raise UsageError(f"{path} contains {what}, which is not loaded: give a file of tensors and values") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UsageError(f"{path} cannot be read as weights ({reason[0]}): copy or download it again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} contains a {type(content).__name__}: give a file with a dictionary of tensors")
    return content


def is_one_file(path: str | Path) -> bool:
    """Return whether ``read_file`` reads a path, so that it is not the folder of a network or a model."""
    return Path(path).is_file() or is_sharded(Path(path))


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        UsageError: The file is missing or is not a JSON object.
    """
    if not path.is_file():
        raise UsageError(f"{path.parent} does not contain {path.name}: give a folder that rewurst or diffusers wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} contains a {type(content).__name__}: it should contain a JSON object")
    return content


def read_folder(folder: str | Path, variant: str | None = None) -> dict[str, Tensor]:
    """Read a network's tensors from a folder in diffusers' format: one file or shards, .safetensors or .bin.

    Args:
        folder: Folder to read.
        variant: Variant to prefer, such as ``fp16`` (default: the plain files, or the only variant).

    Raises:
        UsageError: There are no weights, several variants to choose from, or a file cannot be read.
    """
    folder = Path(folder)
    chosen = variant_in(folder, WEIGHTS, variant)
    dotted = f".{chosen}" if chosen else ""
    for suffix in WEIGHT_SUFFIXES:
        if (path := folder / f"{WEIGHTS}{dotted}{suffix}").is_file():
            return read_file(path)
        if (path := folder / f"{WEIGHTS}{suffix}.index{dotted}.json").is_file():
            shards = sorted(set(read_json(path).get("weight_map", {}).values()))
            return {name: tensor for shard in shards for name, tensor in read_file(folder / Path(shard).name).items()}
    raise UsageError(f"{folder} does not contain weights: {WEIGHTS}.safetensors is missing")


def variant_in(folder: Path, stem: str, wanted: str | None = None) -> str | None:
    """Return the variant of weights to read from a folder, as diffusers and transformers name their files.

    Args:
        folder: Folder to search.
        stem: Beginning of the names of weight files.
        wanted: Variant to prefer if the folder has it.

    Returns:
        ``fp16`` for ``<stem>.fp16.safetensors`` and the like, None for the plain files.

    Raises:
        UsageError: There are several variants and no plain files.
    """
    suffix = "(?:" + "|".join(map(re.escape, WEIGHT_SUFFIXES)) + ")"
    single = re.compile(rf"{re.escape(stem)}(?:\.([^.]+))?{suffix}")
    index = re.compile(rf"{re.escape(stem)}{suffix}\.index(?:\.([^.]+))?\.json")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = {match[1] for name in names if (match := single.fullmatch(name) or index.fullmatch(name))}
    found -= {one for one in found if one and re.fullmatch(r".*-\d{5}-of-\d{5}", one)}
    if wanted in found or not found or None in found:
        return wanted if wanted in found else None
    if len(found) > 1:
        variants = ", ".join(sorted(map(str, found)))
        raise UsageError(f"{folder} has the variants {variants} and no plain weights: choose one with variant")
    return next(iter(found))


def write_folder(folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and one safetensors file in diffusers' format."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})


def check(state: Mapping[str, Any], expected: Mapping[str, Tensor], network: str, where: str) -> None:
    """Check that tensors belong to a network and are complete, finite and of the right shapes.

    Raises:
        UsageError: A tensor is missing or wrong; the message names the first one.
    """
    label = next((stage for _, (name, stage) in MARKS.items() if name == network), network)
    for mark, (other, stage) in MARKS.items():
        if mark in state and mark not in expected:
            raise UsageError(f"{where} contains {stage} ({other}): give a checkpoint of {label} ({network})")
    if missing := next((name for name in expected if name not in state), None):
        raise UsageError(f"{where} lacks {missing}: it is not a complete {network}")
    if surplus := next((name for name in state if name not in expected), None):
        raise UsageError(f"{where} contains {surplus}, which {network} does not have: check its arguments")
    for name in expected:
        tensor = state[name]
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise UsageError(f"{where}: {name} has shape {shapes}: give {network} the arguments it was trained with")
        if not bool(tensor.isfinite().all()):
            raise UsageError(f"{where}: {name} has values that are not finite: give an earlier checkpoint")


def mean(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average a network's checkpoints with equal weights, in float32: the released Stage C is a mean of two."""
    several = list(states)
    first = several[0]
    return {
        name: torch.stack([state[name].float() for state in several]).mean(dim=0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }
