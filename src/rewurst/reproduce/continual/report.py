"""Write ``report.md`` and ``report.json``: losses next to the papers', every claim's verdict, and figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import VERDICTS, claims_table, hours, machine, write
from ..verdicts import Row
from .claims import claims, of_seeds
from .corpora import Data
from .figures import Evidence, draw_all
from .jobs import RunJob
from .paper import STRONG, WEAK, Losses
from .results import Results
from .runs import OLD, Run
from .scales import Scale

METHOD = f"""\
A claim is one number per seed and a bound that was fixed in advance. The number compares runs of the same seed, which
share initial weights, pre-training and the order of the data. *Ours* is its mean over the seeds, *spread* its standard
deviation. {VERDICTS}"""


def write_report(out: Path, scale: Scale, jobs: Sequence[RunJob], data: Data, results: Results) -> dict[str, Any]:
    """Write both files and the figures; return the content of ``report.json``."""
    out.mkdir(parents=True, exist_ok=True)
    names, seeds = (data.old_name, data.new_name), sorted({job.seed for job in jobs})
    runs = list({job.run.name: job.run for job in jobs}.values())
    table = [row for run in runs if (row := _row(run, results, names))]
    losses = of_seeds(results, seeds, *names)
    figures = draw_all(Evidence(jobs, results, names), out) if results else {}
    content = {
        "scale": scale.name,
        "old": names[0],
        "new": names[1],
        "seeds": len(seeds),
        "runs": len(jobs),
        "runs_done": len(results),
        "hours": hours(results),
        "table": table,
        "claims": [claim.row(losses) for claim in claims(splits=bool(data.splits))],
    }
    write(out, content, _markdown(content, scale, jobs, figures))
    return content


def _row(run: Run, results: Results, names: tuple[str, str]) -> Row | None:
    """Return a run's results over the seeds; None if no seed has ended."""
    found = [result for (name, _), result in results.items() if name == run.name]
    if not found:
        return None
    losses = [[result.final(name) if name in result.losses else None for name in names] for result in found]
    old, new = ([value for value in side if value is not None] for side in zip(*losses, strict=True))
    average = [(a + b) / 2 for a, b in zip(old, new, strict=True)] if old and new else []
    row: Row = {"run": run.name, "title": run.title, "seeds": len(found), "tokens": found[0].tokens}
    for name, values in (("old", old), ("new", new), ("average", average)):
        row[name] = statistics.fmean(values) if values else None
        row[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
    row["share_asked"] = run.share
    row["share_read"] = statistics.fmean(result.share_read for result in found)
    row["paper"] = {shift: list(known[run.name]) for shift, known in _PAPER.items() if run.name in known}
    return row


_PAPER: dict[str, dict[str, Losses]] = {"slimpajama": WEAK, "german": STRONG}


def _markdown(content: dict[str, Any], scale: Scale, jobs: Sequence[RunJob], figures: dict[str, str]) -> list[str]:
    lines = [
        *_head(content, scale, jobs),
        "",
        "## Claims",
        "",
        *claims_table(content["claims"]),
        "",
        METHOD,
        "",
        *_at_once(content),
    ]
    lines += ["## Losses", "", *_losses_table(content), ""]
    splits = [row for row in content["table"] if row["old"] is None]
    if splits:
        lines += ["## Three splits of the new data", "", *_splits_table(splits), ""]
    lines += ["## Curves", ""]
    for name, shows in figures.items():
        lines += [f"### {shows}", "", f"![{shows}: validation losses over tokens]({name})", ""]
    return lines


def _at_once(content: dict[str, Any]) -> list[str]:
    """Return how many claims are tested, and how many verdicts chance alone would give."""
    count = len(content["claims"])
    return [
        f"{count} claims are tested at once, each with an error of 5 % on either side: if the truth were exactly at",
        f"every bound, chance alone would call {count * 0.05:.1f} of them held and as many not held.",
        "",
    ]


def _head(content: dict[str, Any], scale: Scale, jobs: Sequence[RunJob]) -> list[str]:
    model = jobs[0].config["model"]["init_args"]["model"]
    sizes = jobs[0].config["data"]["init_args"]
    tokens = sizes["global_batch_size"] * sizes["sequence_length"]
    done = f"{content['runs_done']} of {content['runs']} runs, {content['seeds']} seeds requested"
    return [
        "# Continual pre-training: the papers' claims, tested",
        "",
        "Gupta et al. 2023 ([arXiv 2308.04014](https://arxiv.org/abs/2308.04014)) and Ibrahim et al. 2024",
        "([arXiv 2403.08763](https://arxiv.org/abs/2403.08763)) at another scale. Written by",
        f"`rewurst reproduce continual --scale {scale.name}`: {done}.",
        "",
        f"- Data: {content['old']} (old), then {content['new']} (new).",
        f"- Model: {model['model_type']}, {model['num_hidden_layers']} layers of width {model['hidden_size']}, "
        f"vocabulary {model['vocab_size']}, rows of {sizes['sequence_length']} tokens.",
        f"- Steps per stage: {scale.steps:,} of {tokens:,} tokens, {_count(scale.steps * tokens)} in total; per split: "
        f"{scale.split_steps:,}.",
        f"- Learning rate: peak {scale.peak:g}, minimum a tenth of it, warm-up 1 %, cosine; the optimizer's state is "
        "reset at each re-warming.",
        f"- Time: {content['hours']} hours of runs, on {machine()}.",
    ]


def _losses_table(content: dict[str, Any]) -> list[str]:
    old, new = content["old"], content["new"]
    lines = [
        "Final losses in nats per token on held-out documents: mean and standard deviation over the seeds. The papers'",
        "columns are for their 405M model on the Pile (old), then SlimPajama or German (new): old / new / average.",
        "",
        f"| run | {old} (old) | {new} (new) | average | old minus old only | replay read | tokens | seeds "
        "| SlimPajama | German |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {row["run"]: row for row in content["table"]}
    for row in rows.values():
        if row["old"] is None:
            continue
        change = f"{row['old'] - rows[OLD]['old']:+.3f}" if OLD in rows and row["run"] != OLD else ""
        read = f"{row['share_read']:.2%}" if row["share_asked"] else ""
        papers = [_paper(row["paper"].get(shift)) for shift in _PAPER]
        sides = [_with_spread(row, side) for side in ("old", "new", "average")]
        cells = [row["title"], *sides, change, read, _count(row["tokens"]), str(row["seeds"]), *papers]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _splits_table(rows: list[Row]) -> list[str]:
    lines = ["| run | final loss on new | tokens | seeds |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['title']} | {_with_spread(row, 'new')} | {_count(row['tokens'])} | {row['seeds']} |")
    return lines


def _with_spread(row: Row, side: str) -> str:
    spread = row[f"{side}_spread"]
    return f"{row[side]:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def _paper(losses: list[float] | None) -> str:
    return " / ".join(f"{loss:.2f}" for loss in losses) if losses else ""


def _count(tokens: float) -> str:
    return f"{tokens / 1e9:.2f}B" if tokens >= 1e9 else f"{tokens / 1e6:.2f}M"
