"""The demo's report: validation losses read from TensorBoard logs, a table, a figure, samples."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewurst.reproduce.logged import scalars

CORPORA = ("prose", "code")
# Okabe and Ito's colors, which the colour-blind can tell apart.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Result:
    """Logged values of one run: (tokens seen, loss) per corpus, and the replay share asked for and read."""

    name: str
    title: str
    losses: dict[str, Curve]
    tokens: float
    share_asked: float
    share_read: float

    def final(self, corpus: str) -> float:
        """Loss of the last validation."""
        return self.losses[corpus][-1][1]


def read(name: str, title: str, folder: Path, share: float) -> Result:
    """Read a run's scalars over all its versions. A step that was logged as n has completed n + 1 batches."""
    last_step, tokens = scalars(folder, "tokens")[-1]
    per_step = tokens / (last_step + 1)
    losses = {}
    for corpus in CORPORA:
        losses[corpus] = [((step + 1) * per_step, value) for step, value in scalars(folder, f"val/loss/{corpus}")]
    shares = scalars(folder, "replay/share_read")
    return Result(name, title, losses, tokens, share, shares[-1][1] if shares else 0.0)


def write(results: list[Result], samples: dict[str, str], prompt: str, out: Path, seconds: float) -> dict[str, Any]:
    """Write report.md, report.json and losses.png; return what report.json holds."""
    figure = out / "losses.png"
    _draw(results, figure)
    replayed = next(result for result in results if result.name == "replay")
    start = results[0].tokens
    continual = {
        "loss": {result.name: {corpus: result.final(corpus) for corpus in CORPORA} for result in results},
        "replay_share_asked": replayed.share_asked,
        "replay_share_read": replayed.share_read,
        "tokens": {
            result.name: round(result.tokens - (start if result is not results[0] else 0)) for result in results
        },
        "seconds": round(seconds, 1),
        "hf_folder": str(out / "hf" / "replay"),
        "figure": str(figure),
    }
    add(out, "continual", continual, _markdown(results, samples, prompt, figure.name, seconds))
    return {"continual": continual}


def add(out: Path, name: str, summary: dict[str, Any], text: str) -> None:
    """Put a part into report.json and report.md, in place of an earlier one of that name; other parts stay."""
    path = out / "report.json"
    content = json.loads(path.read_text("utf8")) if path.exists() else {}
    path.write_text(json.dumps(content | {name: summary}, indent=2) + "\n", encoding="utf8")
    path = out / "report.md"
    _, *pieces = re.split(r"<!-- (\w+) -->\n", path.read_text("utf8")) if path.exists() else [""]
    parts = dict(zip(pieces[::2], pieces[1::2], strict=True)) | {name: text}
    path.write_text("".join(f"<!-- {part} -->\n{parts[part]}" for part in parts), encoding="utf8")


def _draw(results: list[Result], figure: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    canvas, panels = plt.subplots(1, len(CORPORA), figsize=(10, 4), sharex=True, layout="constrained")
    start = results[0]
    for panel, corpus in zip(panels, CORPORA, strict=True):
        for colour, result in zip(COLORS, results, strict=False):
            curve = result.losses[corpus] if result is start else [start.losses[corpus][-1], *result.losses[corpus]]
            panel.plot([x / 1e6 for x, _ in curve], [y for _, y in curve], "o-", color=colour, label=result.title)
        panel.axvline(start.tokens / 1e6, color="grey", linewidth=0.8, linestyle=":")
        panel.set(title=f"held-out {corpus}", xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
        panel.grid(alpha=0.3)
    panels[-1].legend()
    canvas.savefig(figure, dpi=110)
    plt.close(canvas)


def _markdown(results: list[Result], samples: dict[str, str], prompt: str, figure: str, seconds: float) -> str:
    start = results[0]
    lines = [
        "# Continual pre-training: prose, then code",
        "",
        "Losses in nats per token on held-out documents. The old corpus is prose, the new one is code. Every run after",
        "the first starts with its weights, re-warms the learning rate and trains on the same number of tokens.",
        f"The whole took {seconds:.0f} s.",
        "",
        "| run | prose | code | average | prose against the start | replay read |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        prose, code = (result.final(corpus) for corpus in CORPORA)
        change = "" if result is start else f"{prose - start.final('prose'):+.3f}"
        share = f"{result.share_read:.2%}" if result.share_asked else ""
        lines.append(f"| {result.title} | {prose:.3f} | {code:.3f} | {(prose + code) / 2:.3f} | {change} | {share} |")
    lines += ["", f"![validation losses over tokens]({figure})", "", f"## Samples, continuing `{prompt}`", ""]
    for result in results:
        lines += [f"### {result.title}", "", "```", samples[result.name], "```", ""]
    return "\n".join(lines)
