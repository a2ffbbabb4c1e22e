"""Results published in the papers, for comparison (405M parameters; losses in nats per token, one seed).

Ibrahim et al. 2024, Table 2 (section 6): Pile -> SlimPajama, a weak shift, and Pile -> German, a strong one.
"""

from __future__ import annotations

from typing import NamedTuple


class Losses(NamedTuple):
    """Final validation losses, and their mean as published, which was computed before rounding."""

    old: float
    new: float
    average: float


WEAK: dict[str, Losses] = {
    "replay_0": Losses(2.44, 2.50, 2.47),
    "replay_0.5": Losses(2.27, 2.50, 2.39),
    "replay_1": Losses(2.26, 2.50, 2.38),
    "replay_5": Losses(2.23, 2.51, 2.37),
    "replay_10": Losses(2.21, 2.51, 2.36),
    "replay_50": Losses(2.16, 2.54, 2.35),
    "both_from_scratch": Losses(2.17, 2.53, 2.35),
}
STRONG: dict[str, Losses] = {
    "replay_0": Losses(3.56, 1.11, 2.34),
    "replay_1": Losses(2.83, 1.12, 1.97),
    "replay_5": Losses(2.57, 1.12, 1.85),
    "replay_10": Losses(2.46, 1.13, 1.80),
    "replay_25": Losses(2.33, 1.16, 1.75),
    "replay_50": Losses(2.24, 1.22, 1.73),
    "both_from_scratch": Losses(2.26, 1.25, 1.75),
}
