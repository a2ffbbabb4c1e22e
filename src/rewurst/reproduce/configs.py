"""Read, merge and write configs for ``rewurst fit`` as plain data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from ..files import write_atomically

Config = dict[str, Any]


def load(path: Path) -> Config:
    """Read a YAML file."""
    content: Config = yaml.safe_load(path.read_text(encoding="utf8"))
    return content


def merge(under: Config, over: Config) -> Config:
    """Return ``over`` merged into ``under``; ``key+`` appends to a list, as on the command line."""
    result = copy.deepcopy(under)
    for key, value in copy.deepcopy(over).items():
        if key.endswith("+"):
            result[key[:-1]] = [*result.get(key[:-1], []), *value]
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def named(class_path: str, **arguments: Any) -> Config:
    """Return a class and its arguments in the form used in configs."""
    return {"class_path": class_path, "init_args": arguments}


def write_config(folder: Path, config: Config) -> Path:
    """Write a run's config into its folder atomically, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    write_atomically(path, f"# rewurst fit --config {path}\n{yaml.safe_dump(config, sort_keys=False)}")
    return path
