"""The recipes of language models, and the arguments of their callbacks and data modules."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewurst import callbacks
from rewurst.callbacks import FSDP, LRRewarming, ReplayScheduler, Schedule
from rewurst.callbacks.learning_rate.lengths import in_steps
from rewurst.datamodules.text import Corpus, TextDataModule

ROOT = Path(__file__).parents[2]


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


COMMAND = re.compile(r"^# (?:by hand: )?rewurst fit (.+)$", re.MULTILINE)


PART = re.compile(r"\A(?:#.*\n)*class_path:")  # a file that recipes name in the place of a class


Config = dict[str, Any]


Parse = Callable[..., Config]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs" / "continual").with_suffix(""))


def command(path: Path) -> list[str]:
    """Return the words after ``rewurst``, with braces expanded as in bash."""
    match = COMMAND.search(path.read_text(encoding="utf8"))
    assert match is not None, f"{path} names no command in its head"
    words = []
    for word in shlex.split(match[1]):
        before, brace, rest = word.partition("{")
        inside, _, after = rest.partition("}")
        words += [f"{before}{choice}{after}" for choice in inside.split(",")] if brace else [word]
    return ["fit", *words]


PARTS = [path for path in CONFIGS if PART.match(path.read_text(encoding="utf8"))]


OF_IMAGES = [path for path in CONFIGS if "wuerstchen" in path.parts]  # tested with their modules


RECIPES = [path for path in CONFIGS if path not in PARTS and path not in OF_IMAGES]


def only(config: Config, class_name: str) -> Config | None:
    """Return the arguments of the only callback of a class."""
    found = [c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"].endswith(f".{class_name}")]
    assert len(found) <= 1
    return found[0] if found else None


def schedule(config: Config) -> tuple[Schedule, int]:
    """Return the learning rate's schedule and length, as the callback gets them."""
    arguments = only(config, "LRRewarming")
    assert arguments is not None
    bound = arguments["schedule"]
    cls = getattr(callbacks, bound["class_path"].rpartition(".")[2])
    result: Schedule = cls(**bound["init_args"])
    LRRewarming(**{**arguments, "schedule": result})
    return result, in_steps(arguments["length"], None)


def data(config: Config) -> TextDataModule:
    arguments = config["data"]["init_args"]
    corpora = {key: Corpus(**value) for key, value in arguments["corpora"].items()}
    return TextDataModule(**{**arguments, "corpora": corpora})


def share(config: Config) -> float:
    arguments = only(config, "ReplayScheduler")
    if arguments is None:
        return 0.0
    ReplayScheduler(**arguments)
    return float(arguments["share"])


def run_folder(config: Config) -> str:
    logger = config["trainer"]["logger"]["init_args"]
    return f"{logger['save_dir']}/{logger['name']}"


def assert_divides(config: Config, devices: int) -> int:
    """Check that micro-batches on all devices make up the global batch; return how many each device takes."""
    trainer, source = config["trainer"], config["data"]["init_args"]
    assert trainer["devices"] * trainer["num_nodes"] == devices
    strategy = trainer["strategy"]
    assert "FSDP" in str(strategy)
    built = FSDP(**({} if isinstance(strategy, str) else strategy["init_args"]))
    replicas = trainer["num_nodes"] if built.replicas == "nodes" else built.replicas
    assert devices % replicas == 0
    accumulation, rest = divmod(source["global_batch_size"], devices * source["micro_batch_size"])
    assert rest == 0
    return accumulation
