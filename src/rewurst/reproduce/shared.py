"""What both studies share."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import UsageError
from ..files import write_atomically

KEY_DIGITS = 10
_STEP = re.compile(r"step=(\d+)")
_DECIDING = ("LRRewarming", "ReplayScheduler")  # the callbacks of the scales' configs log and save
_WATCHING = (
    "logger",
    "profiler",
    "log_every_n_steps",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "devices",
    "num_nodes",
)


def write_config(folder: Path, config: Config) -> Path:
    """Writes a run's config into its folder, whole or not at all, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    write_atomically(path, f"# rewurst fit --config {path}\n{yaml.safe_dump(config, sort_keys=False)}")
    return path


def saved_steps(folder: Path) -> int:
    """The latest step that a checkpoint under a folder is named after, 0 where there is none."""
    steps = [int(match[1]) for path in folder.rglob("*.ckpt") if (match := _STEP.search(path.name))]
    return max(steps, default=0)


def deciding(trainer: Config, callbacks: Sequence[str] = _DECIDING) -> Config:
    """What of a trainer's settings decides a run's outcome; of its callbacks those named."""
    settings = {
        name: value for name, value in trainer.items() if name not in _WATCHING and not name.startswith("enable_")
    }
    return settings | {"callbacks": [each for each in trainer["callbacks"] if each["class_path"] in callbacks]}


def digest(content: Any) -> str:
    """SHA-256 of what JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(path: str) -> str:
    """What a corpus holds, whatever its folder is called: the hash of its index, which has those of its shards."""
    index = Path(path) / "index.json"
    if not index.exists():
        raise UsageError(f"{path} is no prepared corpus: it has no index.json; see `rewurst prepare text --help`")
    return hashlib.sha256(index.read_bytes()).hexdigest()


Config = dict[str, Any]


def load(path: Path) -> Config:
    """Reads a YAML file."""
    content: Config = yaml.safe_load(path.read_text(encoding="utf8"))
    return content


def merge(under: Config, over: Config) -> Config:
    """Lays one config over another, neither changed; ``key+`` appends to a list, as on the command line."""
    result = copy.deepcopy(under)
    for key, value in copy.deepcopy(over).items():
        if key.endswith("+"):
            result[key[:-1]] = [*result.get(key[:-1], []), *value]
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def named(class_path: str, **arguments: Any) -> dict[str, Any]:
    """A class and its arguments, as configs name them."""
    return {"class_path": class_path, "init_args": arguments}


Events = dict[str, list[tuple[int, float]]]
RESULT = "result.json"


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard holds of a tag, over all versions of a run: (step as logged, value), the latest of a step."""
    values: dict[int, float] = {}
    for events in _versions(folder):
        values.update(events.get(tag, []))  # a resumed run repeats steps
    return sorted(values.items())


def _versions(folder: Path) -> list[Events]:
    """What each process of a run logged, by tag, the first process first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for version in sorted(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_"))):
        events = EventAccumulator(str(version), size_guidance={"scalars": 0})
        events.Reload()
        found.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    return found
