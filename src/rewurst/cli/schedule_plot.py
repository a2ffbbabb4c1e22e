"""Plot of the learning rate and the replay share of a config, before anything is trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule

from .. import UsageError
from ..callbacks import LRRewarming, ReplayScheduler, Schedule
from ..callbacks.learning_rate.lengths import in_steps
from .lightning import parse
from .parser import Parser

Line = tuple[str, Any]
_POINTS = 2000
DESCRIPTION = "Draw the learning rate and the replay share of a config before anything is trained."


def run(args: list[str]) -> None:
    """``schedule --config FILE [--config MORE] ... --out FILE``: draws, and prints the values at the joints."""
    out, rest = _take_out(args[1:])
    config = parse(["fit", *rest])
    data = _instantiate(LightningDataModule, config["data"]) if config.get("data") else None
    callbacks = [item for item in config["trainer"].get("callbacks") or [] if _is_ours(item["class_path"])]
    drivers = [_instantiate(Callback, item) for item in callbacks]
    rewarming = next((driver for driver in drivers if isinstance(driver, LRRewarming)), None)
    if rewarming is None:
        raise UsageError("the config has no LRRewarming callback: there is no schedule to draw")
    run = rewarming.planned(data, config["trainer"].get("max_steps") or -1)
    steps = np.unique(np.linspace(0, run.end, _POINTS).round().astype(int))
    lines: list[Line] = [("learning rate", np.array([run.value(int(step)) for step in steps]))]
    lines += [
        ("replay share", _shares(driver, data)(steps)) for driver in drivers if isinstance(driver, ReplayScheduler)
    ]
    end = _end(config, run.end)
    _draw(out, steps, lines, rewarming.schedule.describe(), getattr(data, "tokens_per_step", None), end)
    for name, values in lines:
        marks = ", ".join(f"step {steps[i]}: {values[i]:.4g}" for i in _joints(values))
        print(f"{name}: {marks}")
    if end is not None:
        print(
            f"max_steps {end} ends the run at the vertical line (learning rate {run.value(end):.4g}), the schedule "
            f"ends at step {run.end}; both counted from step 0"
        )
    print(out)


def _end(config: dict[str, Any], schedule_end: int) -> int | None:
    """Return the step at which ``max_steps`` ends a run of one dataset before its schedule does."""
    max_steps = config["trainer"].get("max_steps", -1)
    continues = str(config.get("ckpt_path") or "auto") != "auto"  # then the dataset begins at a step known later
    return max_steps if 0 < max_steps < schedule_end and not continues else None


def _take_out(args: list[str]) -> tuple[Path, list[str]]:
    parser = Parser(
        prog="rewurst schedule", description=DESCRIPTION, epilog="Other options are those of `rewurst fit`."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="Image file to write, such as lr.png")
    known, rest = parser.parse_known_args(args)
    return known.out, rest


def _is_ours(class_path: str) -> bool:
    return class_path.rsplit(".", 1)[-1] in ("LRRewarming", "ReplayScheduler")


def _instantiate(base: type, config: dict[str, Any]) -> Any:
    """One object of a parsed config; the model of 10B parameters stays where it is."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=base)
    return parser.instantiate(parser.parse_object({"it": config})).it


def _shares(driver: ReplayScheduler, data: Any) -> Any:
    if isinstance(driver.share, Schedule) and driver.length is not None:
        return partial(driver.share.value, length=in_steps(driver.length, data))
    return lambda steps: np.full(len(steps), driver.share)


def _joints(values: Any) -> list[int]:
    """First, highest and last point."""
    return sorted({0, int(np.argmax(values)), len(values) - 1})


def _draw(out: Path, steps: Any, lines: list[Line], title: str, tokens_per_step: int | None, end: int | None) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        len(lines), 1, figsize=(8, 2.8 * len(lines) + 0.8), sharex=True, squeeze=False, layout="constrained"
    )
    for panel, (name, values) in zip(panels[:, 0], lines, strict=True):
        panel.plot(steps, values, color="#0072B2")
        panel.set(ylabel=name, ylim=(0, None))
        panel.grid(alpha=0.3)
        if end is not None:
            panel.axvline(end, color="#D55E00", linestyle="--")
    panels[0, 0].set_title(title, fontsize=9)
    panels[-1, 0].set_xlabel("step of the dataset")
    if tokens_per_step is not None:
        unit, size = ("billions", 1e9) if steps[-1] * tokens_per_step >= 1e9 else ("millions", 1e6)
        scale = tokens_per_step / size
        top = panels[0, 0].secondary_xaxis("top", functions=(lambda x: x * scale, lambda x: x / scale))
        top.set_xlabel(f"tokens of the dataset ({unit})")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out} cannot be written: {error}") from error
    finally:
        plt.close(figure)
