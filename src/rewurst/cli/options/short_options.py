"""Short options for what people change most: the peak, its length, and the replay share of a recipe's callbacks."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from ... import UsageError

OWNERS = {"peak": "LRRewarming", "length": "LRRewarming", "share": "ReplayScheduler"}


def add_short_options(parser: LightningArgumentParser) -> None:
    """Add ``--peak``, ``--length`` and ``--share``."""
    parser.add_argument(
        "--peak",
        type=float | None,
        default=None,
        help="peak of LRRewarming's schedule; its other rates keep their ratio to it",
    )
    parser.add_argument(
        "--length", type=int | str | None, default=None, help='LRRewarming\'s length, such as 700 or "1 epoch"'
    )
    parser.add_argument("--share", type=float | None, default=None, help="ReplayScheduler's share of old data")


def apply_short_options(config: Any) -> None:
    """Write the short options that are given into the settings of the callbacks that own them.

    Args:
        config: Parsed config of a subcommand.

    Raises:
        UsageError: The config has no such callback, or its schedule has no peak.
    """
    listed = config["trainer"].get("callbacks") or []
    callbacks = listed if isinstance(listed, list) else [listed]
    for name, owner in OWNERS.items():
        value = config.get(name)
        if value is None:
            continue
        found = [one for one in callbacks if str(one.get("class_path", "")).rpartition(".")[2] == owner]
        if not found:
            raise UsageError(f"--{name} {value} is for the callback {owner}, which this config does not have")
        for callback in found:
            if name == "peak":
                _set_peak(callback["init_args"]["schedule"], value)
            else:
                callback["init_args"][name] = value


def _set_peak(schedule: Any, peak: float) -> None:
    settings = schedule["init_args"]
    before = settings.get("peak")
    if not before:
        name = str(schedule["class_path"]).rpartition(".")[2]
        raise UsageError(f"--peak {peak}: the schedule {name} has no peak")
    for name in ("minimum", "constant"):
        if settings.get(name):
            settings[name] = settings[name] * peak / before
    settings["peak"] = peak
