"""Würstchen's recipes can be built, and the paper's contain the paper's numbers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rewurst import callbacks, modules
from rewurst.callbacks import LRRewarming
from rewurst.modules.latent_diffusion import without_embedding
from rewurst.modules.networks import VQGAN, Prior, SemanticCompressor, StageBUNet
from rewurst.modules.networks.base import build

FOLDER = Path(__file__).parents[2] / "configs" / "wuerstchen"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "scale")


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf8"))
    return content


def names(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def made(part: dict[str, Any]) -> Any:
    arguments = dict(part.get("init_args", {}))
    if part["class_path"] == "LRRewarming":
        schedule = arguments["schedule"]
        arguments["schedule"] = getattr(callbacks, schedule["class_path"])(**schedule["init_args"])
    return getattr(callbacks, part["class_path"])(**arguments)


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_the_head_is_the_command(path: Path) -> None:
    head = path.read_text(encoding="utf8").split("seed_everything")[0]
    assert f"wuerstchen/{names(path)}.yaml" in head or f"{{{path.stem[:-5]},{path.stem}}}.yaml" in head
    for line in head.splitlines():
        assert line.startswith("# ")
        assert len(line) <= 120


@pytest.mark.parametrize("path", [path for path in RECIPES if not path.stem.endswith("_1024")], ids=names)
def test_modules_and_callbacks_are_built_from_the_recipe(path: Path) -> None:
    config = load(names(path))
    arguments = config["model"]["init_args"]
    module = getattr(modules, config["model"]["class_path"])
    assert set(arguments) <= set(inspect.signature(module).parameters)
    with torch.device("meta"):
        if path.stem == "stage_a":
            build(VQGAN, arguments["vqgan"])
        elif config["model"]["class_path"] == "StageC":
            prior = build(Prior, arguments["prior"])
            assert prior.config["c_cond"] == width_of(arguments["text_encoder"])
        elif config["model"]["class_path"] == "LatentDiffusion":
            unet = build(StageBUNet, without_embedding(arguments["unet"]))
            assert unet.config["clip_embd"] == width_of(arguments["text_encoder"])
        else:
            unet = build(StageBUNet, arguments["unet"])
            compressor = build(SemanticCompressor, arguments["compressor"])
            assert unet.config["effnet_embd"] == compressor.config["c_latent"]
            assert arguments["stage_a"] == f"runs/wuerstchen/{path.parent.name}/stage_a/checkpoints/last.ckpt"
    ours = [c for c in config["trainer"]["callbacks"] if c["class_path"] in callbacks.__all__]
    built = [made(callback) for callback in ours]
    [rewarming] = [callback for callback in built if isinstance(callback, LRRewarming)]
    length = next(c["init_args"]["length"] for c in ours if c["class_path"] == "LRRewarming")
    begun = load("shapes/stage_c")["trainer"]["max_steps"] if path.stem == "continue_c" else 0
    assert begun + length == config["trainer"]["max_steps"]
    assert rewarming.schedule.value(length // 2, length) > 0
    data = config["data"]["init_args"]
    devices = config["trainer"]["devices"] * config["trainer"].get("num_nodes", 1)
    assert data["global_batch_size"] % (data["micro_batch_size"] * devices) == 0


@pytest.mark.parametrize("path", RECIPES, ids=names)
def test_the_last_step_is_saved(path: Path) -> None:
    trainer = load(names(path))["trainer"]
    saved = trainer if "callbacks" in trainer else load(names(path).removesuffix("_1024"))["trainer"]
    [checkpoint] = [c["init_args"] for c in saved["callbacks"] if c["class_path"] == "ModelCheckpoint"]
    assert checkpoint["save_last"]
    assert trainer["max_steps"] % checkpoint["every_n_train_steps"] == 0


def width_of(text_encoder: Any) -> int:
    """Return the width of the states: ours, or that of the hub's models."""
    if isinstance(text_encoder, dict):
        return int(text_encoder["hidden_size"])
    return {"vit-large": 768, "ViT-H": 1024, "ViT-bigG": 1280}[re.search(r"vit-large|ViT-H|ViT-bigG", text_encoder)[0]]  # type: ignore[index]


@pytest.mark.parametrize("folder", ["shapes", "emoji"])
def test_stages_fit_each_other(folder: str) -> None:
    b, c = (load(f"{folder}/{stage}")["model"]["init_args"] for stage in ("stage_b", "stage_c"))
    assert c["stage_b"] == f"runs/wuerstchen/{folder}/stage_b/checkpoints/last.ckpt"
    assert build(SemanticCompressor, b["compressor"]).config["c_latent"] == build(Prior, c["prior"]).config["c_in"]
    assert b["text_length"] == c["text_encoder"]["max_position_embeddings"], "an export needs as many states"


@pytest.mark.parametrize("folder", ["shapes", "emoji"])
def test_the_single_stage_is_the_priors_size_and_trained_alike(folder: str) -> None:
    c, single = (load(f"{folder}/{stage}") for stage in ("stage_c", "single_stage"))
    with torch.device("meta"):
        prior = build(Prior, c["model"]["init_args"]["prior"])
        unet = build(StageBUNet, without_embedding(single["model"]["init_args"]["unet"]))
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (prior, unet)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
    own = {"stage_a", "stage_b", "prior", "unet", "latent_mean", "latent_std"}
    shared = [{k: v for k, v in config["model"]["init_args"].items() if k not in own} for config in (c, single)]
    assert shared[0] == shared[1]
    assert c["data"]["init_args"]["global_batch_size"] == single["data"]["init_args"]["global_batch_size"]


def test_the_continued_prior_is_the_same_model_with_replay() -> None:
    before, after = load("shapes/stage_c"), load("continue_c")
    assert before["model"] == after["model"]
    assert after["ckpt_path"] == "auto:runs/wuerstchen/shapes/stage_c"
    assert after["data"]["init_args"]["dataset"] != before["data"]["init_args"]["dataset"]
    assert after["data"]["init_args"]["corpora"]["shapes"]["replay"]
    [replay] = [c for c in after["trainer"]["callbacks"] if c["class_path"] == "ReplayScheduler"]
    assert 0.05 <= replay["init_args"]["share"] <= 0.25


def test_the_papers_prior() -> None:
    c, later = load("paper/stage_c"), load("paper/stage_c_1024")
    assert (c["trainer"]["max_steps"], c["data"]["init_args"]["global_batch_size"]) == (500_000, 1536)
    assert later["trainer"]["max_steps"] - c["trainer"]["max_steps"] == 364_000
    schedule = next(made(one) for one in c["trainer"]["callbacks"] if one["class_path"] == "LRRewarming").schedule
    assert schedule.value(10_000, 500_000) == pytest.approx(1e-4)
    average = next(one["init_args"] for one in c["trainer"]["callbacks"] if one["class_path"] == "WeightAverage")
    assert average == {"decay": 0.9, "every": 100, "start_step": 5000}
    with torch.device("meta"):
        prior = build(Prior, load("finetune_c")["model"]["init_args"]["prior"])
    assert sum(p.numel() for p in prior.parameters()) == 993_636_896


def test_the_papers_numbers() -> None:
    a, b, later = (load(f"paper/{name}") for name in ("stage_a", "stage_b", "stage_b_1024"))
    assert (a["trainer"]["max_steps"], a["data"]["init_args"]["global_batch_size"]) == (500_000, 256)
    assert (b["trainer"]["max_steps"], b["data"]["init_args"]["global_batch_size"]) == (457_000, 512)
    assert later["trainer"]["max_steps"] - b["trainer"]["max_steps"] == 300_000
    assert later["data"]["init_args"]["global_batch_size"] == 128
    schedule = next(made(c) for c in b["trainer"]["callbacks"] if c["class_path"] == "LRRewarming").schedule
    assert schedule.value(10_000, 457_000) == pytest.approx(1e-4)
    assert schedule.value(5_000, 457_000) == pytest.approx(5e-5, rel=1e-3)
    with torch.device("meta"):
        assert sum(p.numel() for p in build(VQGAN, a["model"]["init_args"]["vqgan"]).parameters()) == 18_406_894
        unet = build(StageBUNet, b["model"]["init_args"]["unet"])
    assert sum(p.numel() for p in unet.parameters()) == 1_055_365_280


def test_the_shapes_embedding_is_forty_times_smaller_than_a_picture() -> None:
    config = load("shapes/stage_b")
    compressor = build(SemanticCompressor, config["model"]["init_args"]["compressor"]).eval()
    side = config["data"]["init_args"]["image_size"]
    with torch.no_grad():
        z = compressor(torch.rand(1, 3, side, side))
    assert 3 * side**2 / z.numel() >= 40
