"""A comparison of many hours must not start over because the program changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewurst.reproduce.wuerstchen.costs import Cost
from rewurst.reproduce.wuerstchen.jobs import Pictures, Plan, make_jobs

KNOWN = {
    "stage_a": "2e320af2bd03", "stage_b": "1daba7c99510", "latents": "8fe34b74ce66", "stage_c": "24fbc20005b8",
    "single_stage": "ee70c41b08ad", "judge_stage_c": "0d9995284f87", "judge_single_stage": "85b9ca3eef2b",
    "stage_b_4x8x8": "ce91c939ebb7", "stage_b_16x8x8": "303c29eaea49", "judge_stage_b": "9c58fdce0d1e",
    "judge_stage_b_4x8x8": "b63be2f7ae9b", "timing": "f6c442bc1b82",
}  # fmt: skip


def recipe(stage: str, **model: Any) -> dict[str, Any]:
    sizes = {"micro_batch_size": 4, "global_batch_size": 8}
    callbacks = [{"class_path": name, "init_args": {}} for name in ("LRRewarming", "WeightAverage", "ModelCheckpoint")]
    return {
        "model": {"class_path": stage, "init_args": model},
        "data": {"class_path": "ImageTextDataModule", "init_args": {"dataset": "shapes", "image_size": 64} | sizes},
        "trainer": {"max_steps": 80, "precision": "bf16-mixed", "devices": 1, "callbacks": callbacks},
    }


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    for name in ("train", "seen", "tokenizer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("tokenizer.json" if name == "tokenizer" else "index.json")).write_text(name)
    compressor = {
        "backbone": "small", "widths": [8, 8, 8], "c_latent": 4, "input_scale": 1.0,
    }  # fmt: skip
    recipes = {
        "stage_a": recipe("StageA", vqgan={"embed_dim": 16}),
        "stage_b": recipe("StageB", stage_a="", unet={"preset": "tiny", "effnet_embd": 4}, compressor=compressor),
        "stage_c": recipe("StageC", stage_b="", text_encoder={"tokenizer": "", "hidden_size": 16}),
        "single_stage": recipe("LatentDiffusion", stage_a="", text_encoder={"tokenizer": "", "hidden_size": 16}),
    }
    pictures = Pictures(str(tmp_path / "train"), {"seen": str(tmp_path / "seen")}, str(tmp_path / "tokenizer"), True)
    return Plan(recipes, pictures, tmp_path / "out", prompts=8, short_steps=40)


def test_keys_of_earlier_jobs_do_not_change(plan: Plan) -> None:
    costs = {stage: Cost(1, 1.0, 1.0) for stage in plan.recipes}
    keys = {job.name: job.key[:12] for job in make_jobs(plan, costs, [0, 1])}
    assert {kind: keys[kind, 0] for kind in KNOWN} == KNOWN
    assert (keys["stage_c", 1], keys["judge_stage_b_2x8x8", 1]) == ("fc71b9ea67df", "91ba92af572a")
    by_fid = replace(plan, pictures=replace(plan.pictures, drawn=False), inception="inception.pth")
    judged = {job.kind: job.key[:12] for job in make_jobs(by_fid, costs, [0])}
    assert (judged["judge_stage_c"], judged["judge_stage_b"]) == ("56c1e670b030", "e1657c0f3e80")
