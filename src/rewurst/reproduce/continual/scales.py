"""Scales of the experiments: model, batch and trainer from the configs for users, and the length of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..configs import Config, load, merge

CONFIGS = Path(__file__).parents[2] / "configs" / "continual"


@dataclass(frozen=True)
class Scale:
    """Size at which the experiments run.

    Args:
        name: Name on the command line.
        configs: Files under ``configs/continual``; later ones override earlier ones.
        steps: Number of steps per stage.
        split_steps: Number of steps on each of three splits.
        peak: Peak learning rate.
        every: Approximate number of steps between validations and between checkpoints.
        data: Recipe of the default data, relative to ``configs/continual``; None for the built-in corpora.
        splits: Recipes of the three splits of its new data.
        held_out: Shares of old and new documents held out for validation when sources are prepared.
        jobs: Number of runs at a time; None for one per core.
    """

    name: str
    configs: tuple[str, ...]
    steps: int
    split_steps: int
    peak: float
    every: int
    data: str | None = None
    splits: tuple[str, ...] = ()
    held_out: tuple[float, float] = (0.01, 0.01)
    jobs: int | None = 1


_PAPER_DATA = "ibrahim/data/slimpajama.yaml"
_PAPER_SPLITS = tuple(f"ibrahim/data/split_{number}.yaml" for number in (1, 2, 3))
SCALES = {
    scale.name: scale
    for scale in (
        Scale("tiny", ("demo.yaml",), 500, 250, 2e-3, 50, held_out=(0.05, 0.03), jobs=None),
        Scale(
            "small",
            ("base.yaml", "models/pythia_70m.yaml", "pythia_70m/one_gpu.yaml"),
            5300,
            1766,
            1e-3,
            500,
            _PAPER_DATA,
            _PAPER_SPLITS,
        ),
        Scale(
            "405m", ("base.yaml", "models/pythia_410m.yaml"), 132_366, 44_229, 3e-4, 1000, _PAPER_DATA, _PAPER_SPLITS
        ),
    )
}


def base_config(scale: Scale) -> Config:
    """Return the scale's merged configs, based on the settings of its default data."""
    config: Config = {} if scale.data is None else {"data": load(CONFIGS / scale.data)}
    for name in scale.configs:
        config = merge(config, load(CONFIGS / name))
    return config
