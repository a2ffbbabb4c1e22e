"""Draw figures of scores over training FLOPs, and of Stage B's quality over the compression."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..continual.figures import COLORS, MARKERS, STYLES, Style
from .curves import shifted
from .evidence import CASCADE, SINGLE, Evidence

LABELS = {"all": "share of pictures with all attributes correct", "fid": "FID (lower is better)"}


def draw_all(evidence: Evidence, folder: Path) -> dict[str, str]:
    """Draw every figure for which there are results; return the titles by file name."""
    import matplotlib

    matplotlib.use("agg")
    drawn = {}
    if any(evidence.points(model, seed) for model in (CASCADE, SINGLE) for seed in evidence.seeds):
        draw_scores(evidence, folder / "flops.png")
        drawn["flops.png"] = "Score over training FLOPs"
    if any(evidence.compressions(seed) for seed in evidence.seeds):
        draw_compressions(evidence, folder / "compression.png")
        drawn["compression.png"] = "Quality of Stage B over the compression"
    return drawn


def draw_scores(evidence: Evidence, path: Path) -> None:
    """Draw Stage C only, Stage B followed by C, and the single stage, with a line per seed."""
    from matplotlib import pyplot as plt

    canvas, panel = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    lines = [
        ("Stage C (Stage B already exists)", CASCADE, 0.0),
        ("Stage B, then Stage C", CASCADE, evidence.flops_of_b),
        ("single stage", SINGLE, 0.0),
    ]
    sign = -1 if evidence.score == "fid" else 1
    for index, (label, model, before) in enumerate(lines):
        for seed in evidence.seeds:
            curve = shifted(evidence.curve(model, seed), before)
            style: Style = {
                "color": COLORS[index],
                "linestyle": STYLES[index],
                "marker": MARKERS[index],
                "markersize": 5,
            }
            first = label if seed == evidence.seeds[0] else None
            panel.plot([x for x, _ in curve], [sign * y for _, y in curve], label=first, linewidth=1.6, **style)
    panel.set(xlabel="training FLOPs", ylabel=LABELS[evidence.score or "all"], xlim=(0, None))
    if sign > 0:
        panel.set_ylim(0, 1)
    panel.grid(alpha=0.3)
    panel.legend()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def draw_compressions(evidence: Evidence, path: Path) -> None:
    """Draw PSNR and, for drawn shapes, the attributes kept by reconstructions over the compression."""
    from matplotlib import pyplot as plt

    rows = [row for seed in evidence.seeds for row in evidence.compressions(seed)]
    measures = [("psnr", "PSNR of reconstructions (dB)")]
    measures += [("all", "share with all attributes kept")] if all("all" in row for row in rows) else []
    canvas, panels = plt.subplots(1, len(measures), figsize=(5.5 * len(measures), 4.4), layout="constrained")
    for panel, (name, label) in zip(panels if len(measures) > 1 else [panels], measures, strict=True):
        _line(panel, [row for row in rows if row["run"] != "stage_b"], name)
        whole = [row for row in rows if row["run"] == "stage_b"]
        ends = {"color": COLORS[1], "marker": MARKERS[1], "linestyle": "none", "label": "the recipe's whole run"}
        panel.plot([row["per_side"] for row in whole], [row[name] for row in whole], **ends)
        panel.set(xlabel="pixels per place of z and side", ylabel=label, xscale="log")
        ticks = sorted({row["per_side"] for row in rows})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.margins(x=0.15, y=0.12)  # room for the names of z
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def _line(panel: Any, rows: Sequence[dict[str, Any]], name: str) -> None:
    """Draw the mean over seeds at each z; equal compressions are above each other, each labeled with its z."""
    found: dict[tuple[float, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["per_side"], "x".join(map(str, row["z"]))), []).append(row[name])
    means = [(ratio, z, sum(values) / len(values)) for (ratio, z), values in sorted(found.items())]
    style = {"color": COLORS[0], "marker": MARKERS[0], "linestyle": STYLES[0], "label": "short runs, by z"}
    panel.plot([ratio for ratio, _, _ in means], [value for _, _, value in means], **style)
    for ratio, z, value in means:
        panel.annotate(z, (ratio, value), textcoords="offset points", xytext=(6, 6), fontsize=9)
