"""Read what to train from the recipes for users, without repeating anything of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import UsageError
from ...modules.networks import SemanticCompressor
from ...modules.networks.base import build
from ..configs import Config, load, named

CONFIGS = Path(__file__).parents[2] / "configs" / "wuerstchen"
STAGES = ("stage_a", "stage_b", "stage_c", "single_stage")
COMPRESSIONS = ((16, 8), (4, 8), (2, 8), (4, 16), (16, 16), (16, 32))
"""Channels of z, and side in pixels of the patch at each of its places."""
SHORT_STEPS = 1000
POINTS = (8, 10, 6, 5, 4)
"""Numbers of equal parts that a run may be divided into, the best first."""

Recipes = dict[str, Config]


@dataclass(frozen=True)
class Where:
    """Inputs of a run as paths or, for its key, as hashes of their contents.

    Args:
        train: Folder of the training images, or of their latents.
        val: Folders for validation by name.
        tokenizer: Folder of the tokenizer.
        stage_a: Checkpoint of Stage A.
        stage_b: Checkpoint of Stage B.
    """

    train: str
    val: dict[str, str]
    tokenizer: str
    stage_a: str = ""
    stage_b: str = ""


def read_recipes(folder: Path, image_size: int | None = None) -> Recipes:
    """Return the recipes of a folder by stage; ``image_size`` replaces theirs."""
    recipes = {}
    for stage in STAGES:
        path = folder / f"{stage}.yaml"
        if not path.is_file():
            raise UsageError(f"{path} is missing: the comparison needs recipes of {', '.join(STAGES)}")
        recipes[stage] = load(path)
        arguments = recipes[stage]["data"]["init_args"]
        if image_size is not None and "image_size" in arguments:
            arguments["image_size"] = image_size
    return recipes


def image_size_of(recipes: Recipes) -> int:
    """Return the side of the pictures in pixels."""
    return int(recipes["stage_b"]["data"]["init_args"]["image_size"])


def steps_of(recipe: Config) -> int:
    """Return the steps of a recipe, reduced if needed to divide the run into equal parts."""
    return whole_parts(int(recipe["trainer"]["max_steps"]))


def whole_parts(steps: int) -> int:
    """Return the given steps, or the next smaller number that ``parts`` can divide."""
    return steps if any(steps % number == 0 for number in POINTS) else max(POINTS[-1], steps - steps % POINTS[0])


def parts(steps: int) -> int:
    """Return the number of parts into which a run of these steps is divided."""
    return next((number for number in POINTS if steps % number == 0), 1)


def placed(recipe: Config, where: Where, seed: int, steps: int) -> Config:
    """Return a recipe with other data, seed and length; loggers and the like stay unchanged."""
    config = copy.deepcopy(recipe)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    for stage in ("stage_a", "stage_b"):
        if stage in model:
            model[stage] = getattr(where, stage)
    if isinstance(model.get("text_encoder"), dict):
        model["text_encoder"]["tokenizer"] = where.tokenizer
    data |= {"corpora": {data["dataset"]: {"path": where.train}}, "val": dict(where.val), "seed": seed}
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "LRRewarming":
            callback["init_args"]["length"] = steps
    config["trainer"] |= {"max_steps": steps}
    return config | {"seed_everything": seed}


def set_outputs(config: Config, folder: Path, steps: int, keep_all: bool) -> None:
    """Make a config log and save in a folder at equal parts of the run, and validate at its middle and end."""
    every, trainer = steps // parts(steps), config["trainer"]
    data = config["data"]["init_args"]
    micro_batches = max(1, data["global_batch_size"] // data["micro_batch_size"])
    trainer |= {"enable_progress_bar": False, "val_check_interval": micro_batches * every * (parts(steps) // 2 or 1)}
    trainer["logger"] = named("TensorBoardLogger", save_dir=str(folder.parent), name=folder.name)
    for callback in trainer["callbacks"]:
        if callback["class_path"] == "ModelCheckpoint":
            saved = {"dirpath": str(folder / "checkpoints"), "filename": "{step}", "every_n_train_steps": every}
            callback["init_args"] = saved | {"save_top_k": -1 if keep_all else 1, "save_last": not keep_all}
    config["ckpt_path"] = "auto"


def compressed(recipe: Config, channels: int, pixels: int) -> Config | None:
    """Return Stage B's recipe with another z; None if its compressor does not allow it."""
    config = copy.deepcopy(recipe)
    model = config["model"]["init_args"]
    settings = compressor_of(recipe)
    if settings["backbone"] != "small":
        return None
    levels = round(pixels * settings["input_scale"]).bit_length() - 1
    widths = settings["widths"]
    settings |= {"c_latent": channels, "widths": [*widths, *[widths[-1]] * levels][:levels]}
    model["compressor"] = settings
    unet = {"preset": model["unet"]} if isinstance(model["unet"], str) else dict(model["unet"])
    model["unet"] = unet | {"effnet_embd": channels}
    return config


def compressor_of(recipe: Config) -> dict[str, Any]:
    """Return all arguments of Stage B's compressor."""
    with torch.device("meta"):
        return dict(build(SemanticCompressor, recipe["model"]["init_args"].get("compressor", "paper")).config)


def shape_of(recipe: Config, side: int) -> tuple[int, int, int]:
    """Return the shape (c, h, w) of z for pictures of the given side."""
    with torch.device("meta"):
        compressor = build(SemanticCompressor, recipe["model"]["init_args"].get("compressor", "paper"))
    height, width = compressor.latent_size((side, side))
    return compressor.config["c_latent"], height, width


def ratios_of(shape: tuple[int, int, int], side: int) -> dict[str, float]:
    """Return how many times smaller z is than a picture: per side, in positions and in numbers.

    The paper's "42:1" is per side (section 3.1): 1,820 times fewer positions and 341 times fewer numbers.
    """
    channels, height, width = shape
    positions = side * side / (height * width)
    return {"per_side": side / height, "positions": positions, "numbers": 3 * positions / channels}


def variants(recipes: Recipes) -> dict[str, Config]:
    """Return short runs of Stage B by name for every possible compression, including the recipe's own."""
    recipe, side = recipes["stage_b"], image_size_of(recipes)
    candidates = [recipe, *(compressed(recipe, *numbers) for numbers in COMPRESSIONS)]
    found: dict[str, Config] = {}
    for config in candidates:
        if config is not None and min(shape_of(config, side)) > 0:
            found.setdefault("stage_b_" + "x".join(map(str, shape_of(config, side))), config)
    return found
