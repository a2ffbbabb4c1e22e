"""The table of hyper-parameters matches the recipes and the classes' defaults."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rewurst import callbacks, modules
from rewurst.modules import causal_lm, networks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import hyperparameters  # noqa: E402

ROWS = [
    (row["where"], key, value)
    for rows in hyperparameters.entries().values()
    for row in rows
    for key, value in row["value"].items()
]


def in_recipe(where: str, key: str) -> Any:
    """Return a value of a YAML file: of its trainer, model or data, of a callback or schedule, or of a part."""
    config = yaml.safe_load((ROOT / "configs" / f"{where}.yaml").read_text("utf8"))
    place, _, rest = key.partition(".")
    if place == "trainer":
        return config["trainer"][rest]
    if place in ("model", "data"):
        part = config.get(place, config)["init_args"]
        if rest == "weights":
            return [corpus["weight"] for corpus in part["corpora"].values() if not corpus.get("replay")]
        for word in rest.split("."):
            part = part[word] if word in part else part["model"][word]
        return part
    if not rest:
        return config["init_args"][place]
    trainer = config["trainer"]
    for callback in trainer.get("callbacks", trainer.get("callbacks+")):
        if callback["class_path"] == place:
            arguments = callback["init_args"]
            return arguments[rest] if rest in arguments else arguments["schedule"]["init_args"][rest]
    raise AssertionError(f"{where} has no {place}")


def default_of(where: str, key: str) -> Any:
    """Return a class's default, or a setting of a network's preset or a stage's named optimizer."""
    name, _, preset = where.partition(".")
    if preset:
        with torch.device("meta"):
            return getattr(networks, name).from_preset(preset).config[key]
    kind: Any = getattr(modules, name, None) or getattr(callbacks, name)
    if key.startswith("settings."):
        settings = causal_lm.PAPERS if name == "CausalLM" else kind.optimizer_settings
        value = getattr(settings, key.removeprefix("settings."))
        return list(value) if isinstance(value, tuple) else value
    return inspect.signature(kind).parameters[key].default


@pytest.mark.parametrize(("where", "key", "value"), ROWS, ids=lambda each: str(each))
def test_recipes_and_defaults_are_as_the_table_says(where: str, key: str, value: Any) -> None:
    found = in_recipe(where, key) if "/" in where else default_of(where, key)
    assert found == value


def test_the_page_has_the_tables_of_the_file() -> None:
    text = hyperparameters.PAGE.read_text("utf8")
    assert hyperparameters.page(text) == text
    assert text.count("| 24, 1024, 16 (Ibrahim 5.3) |") == 1
