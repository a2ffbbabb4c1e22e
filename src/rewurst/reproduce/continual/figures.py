"""Draw figures like the papers': validation loss on old and new data over tokens, mean and range over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import callbacks
from ...callbacks.learning_rate.dataset_schedule import DatasetRun
from . import runs
from .jobs import RunJob
from .results import Curve, Results

# Okabe and Ito's colors, which color-blind readers can tell apart; line styles work without colors.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SHARES_MAP = "viridis"  # from dark to light, suited to color-blind readers

Style = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """Results to draw.

    Args:
        jobs: All runs of all seeds.
        results: Results of finished runs.
        names: Names of the old and the new validation corpus.
    """

    jobs: Sequence[RunJob]
    results: Results
    names: tuple[str, str]

    def curves(self, run: str, corpus: str) -> list[Curve]:
        """Return a run's curve for each seed."""
        found = [result for (name, _), result in self.results.items() if name == run]
        return [result.losses[corpus] for result in found if corpus in result.losses]

    def has(self, *names: str) -> bool:
        """Return whether every run has ended with at least one seed."""
        there = {name for name, _ in self.results}
        return there.issuperset(names)

    @property
    def tokens_per_step(self) -> float:
        """Number of tokens per step."""
        result = next(iter(self.results.values()))
        return result.tokens / result.steps


def draw_all(evidence: Evidence, folder: Path) -> dict[str, str]:
    """Draw every figure whose runs have ended; return the titles by file name."""
    import matplotlib

    matplotlib.use("agg")
    figures: dict[str, tuple[Callable[[Evidence, Path], None], list[str], str]] = {
        "replay.png": (
            draw_replay,
            [runs.OLD, runs.BASE, runs.replay_name(0.05)],
            "Replay shares, and training from scratch",
        ),
        "peaks.png": (draw_peaks, [runs.OLD, runs.BASE, runs.LOW], "A constant low learning rate, and three peaks"),
        "warmups.png": (draw_warmups, [runs.OLD, runs.BASE], "Lengths of the warm-up"),
        "again.png": (draw_again, [runs.OLD, runs.again_name(1.0)], "Re-warming on the same data again"),
        "splits.png": (
            draw_splits,
            [runs.split_name(runs.COSINE_CHAIN, 3)],
            "Three splits of the new data, one after the other",
        ),
    }
    drawn = {}
    for name, (draw, needed, shows) in figures.items():
        if evidence.has(*needed):
            draw(evidence, folder / name)
            drawn[name] = shows
    return drawn


def draw_replay(evidence: Evidence, path: Path) -> None:
    """Draw all replay shares like figures 4 and 5 of Ibrahim et al."""
    import matplotlib

    shares = (0.0, *runs.SHARES)
    colors = matplotlib.colormaps[_SHARES_MAP]
    lines: dict[str, tuple[str, Style]] = {}
    for index, share in enumerate(shares):
        label = f"{share * 100:g} % replay" if share else "no replay"
        marker = {"marker": MARKERS[index], "markersize": 4}
        lines[runs.replay_name(share)] = (label, {"color": colors(index / len(shares)), **marker})
    lines[runs.BOTH_SCRATCH] = ("both from scratch", {"color": "#D55E00", "linestyle": "--"})
    lines[runs.NEW_SCRATCH] = ("new from scratch", {"color": "#CC79A7", "linestyle": ":"})
    _draw_both(evidence, path, lines)


def draw_peaks(evidence: Evidence, path: Path) -> None:
    """Draw the constant low rate and the peaks, without replay."""
    lines = {runs.LOW: ("constant, a tenth of the peak", _style(3))}
    lines |= {runs.peak_name(f): (f"re-warmed to {f:g} x the peak", _style(i)) for i, f in enumerate(runs.PEAKS)}
    _draw_both(evidence, path, lines)


def draw_warmups(evidence: Evidence, path: Path) -> None:
    """Draw the lengths of the warm-up, without replay."""
    _draw_both(
        evidence, path, {runs.warmup_name(w): (f"{w * 100:g} % warm-up", _style(i)) for i, w in enumerate(runs.WARMUPS)}
    )


def draw_again(evidence: Evidence, path: Path) -> None:
    """Draw runs on the same data again."""
    lines = {
        runs.again_name(f): (f"re-warmed to {f:g} x the peak", _style(i))
        for i, f in enumerate(f for f in runs.PEAKS if f >= 1)
    }
    _draw_both(evidence, path, lines)


def draw_splits(evidence: Evidence, path: Path) -> None:
    """Draw the loss on the new corpus over three splits, and the learning rates below."""
    from matplotlib import pyplot as plt

    canvas, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained")
    unit, size = _unit(evidence)
    for index, chain in enumerate((runs.COSINE_CHAIN, *runs.INFINITE)):
        label = "chain of re-warmed cosines" if chain == runs.COSINE_CHAIN else f"{chain.replace('_', ' ')}"
        for split in (1, 2, 3):
            curves = evidence.curves(runs.split_name(chain, split), evidence.names[1])
            _line(above, curves, evidence.tokens_per_step / size, label if split == 1 else None, _style(index))
        steps, rates = _learning_rates(evidence.jobs, chain)
        below.plot([step * evidence.tokens_per_step / size for step in steps], rates, label=label, **_style(index))
    ends = [
        job.steps for job in evidence.jobs if job.run.name in {runs.split_name(runs.COSINE_CHAIN, n) for n in (1, 2)}
    ]
    for panel in (above, below):
        for end in ends:
            panel.axvline(end * evidence.tokens_per_step / size, color="grey", linewidth=0.8, linestyle=":")
        panel.grid(alpha=0.3)
    above.set(ylabel="validation loss (nats per token)", title=f"held-out {evidence.names[1]}")
    below.set(ylabel="learning rate", xlabel=f"tokens seen ({unit})", ylim=(0, None))
    above.legend()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def _draw_both(evidence: Evidence, path: Path, lines: dict[str, tuple[str, Style]]) -> None:
    """Draw old and new side by side, including the pre-training that all runs share."""
    from matplotlib import pyplot as plt

    canvas, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharex=True, layout="constrained")
    unit, size = _unit(evidence)
    scale = evidence.tokens_per_step / size
    for panel, corpus, side in zip(panels, evidence.names, ("old", "new"), strict=True):
        pre_training = evidence.curves(runs.OLD, corpus)
        _line(panel, pre_training, scale, "old only (pre-training)", {"color": "black"})
        begin = pre_training[0][-1][0]
        for run, (label, style) in lines.items():
            _line(panel, evidence.curves(run, corpus), scale, label, style)
        panel.axvline(begin * scale, color="grey", linewidth=0.8, linestyle=":")
        panel.set(title=f"held-out {corpus} ({side})", xlabel=f"tokens seen ({unit})")
        panel.set(ylabel="validation loss (nats per token)", ylim=_limits(evidence, corpus, [runs.OLD, *lines]))
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def _line(panel: Any, curves: Sequence[Curve], scale: float, label: str | None, style: Style) -> None:
    """Draw the mean over seeds as a line and the range as a band."""
    if not curves:
        return
    by_seed = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in by_seed)))
    tokens = [step * scale for step in steps]
    values = [[curve[step] for curve in by_seed] for step in steps]
    panel.plot(tokens, [sum(each) / len(each) for each in values], label=label, linewidth=1.6, **style)
    if len(curves) > 1:
        band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        panel.fill_between(tokens, [min(each) for each in values], [max(each) for each in values], **band)


def _limits(evidence: Evidence, corpus: str, names: Sequence[str]) -> tuple[float, float]:
    """Return limits that show every end and all continued runs; first steps from fresh weights are cut off."""
    ends, others = [], []
    for run in names:
        for curve in evidence.curves(run, corpus):
            ends.append(curve[-1][1])
            if run not in (runs.OLD, runs.BOTH_SCRATCH, runs.NEW_SCRATCH):
                others += [loss for _, loss in curve]
    low, high = min(ends), max(ends + others)
    room = 0.05 * (high - low)
    return low - room, high + room


def _learning_rates(jobs: Sequence[RunJob], chain: str) -> tuple[list[int], list[float]]:
    steps: list[int] = []
    rates: list[float] = []
    seed = jobs[0].seed
    for job in jobs:
        if job.seed != seed or job.run.name not in {runs.split_name(chain, split) for split in (1, 2, 3)}:
            continue
        schedule = getattr(callbacks, job.run.schedule["class_path"])(**job.run.schedule["init_args"])
        continues = job.parent is not None and chain != runs.COSINE_CHAIN
        run = DatasetRun("", schedule, job.run.steps, job.run.extension, start=job.start, continues=continues)
        own = range(job.start, job.steps + 1, max(1, job.run.steps // 250))
        steps += own
        rates += [run.value(step) for step in own]
    return steps, rates


def _style(index: int) -> Style:
    return {"color": COLORS[index], "linestyle": STYLES[index]}


def _unit(evidence: Evidence) -> tuple[str, float]:
    most = max(result.tokens for result in evidence.results.values())
    return ("billions", 1e9) if most >= 1e9 else ("millions", 1e6)
