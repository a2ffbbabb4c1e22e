"""Write ``report.md`` and ``report.json`` of the comparison: ratios, claims, points, costs and the paper's FLOPs."""

from __future__ import annotations

from ...preparation.sources.pictures.shapes import Shape
from ..report import VERDICTS, claims_table, hours, machine, write
from ..verdicts import Row
from .costs import a100_hours, as_rows, released
from .evidence import CASCADE, CLAIMS, LARGEST_COST, SINGLE, Evidence, breaks_at
from .figures import draw_all
from .jobs import baseline_steps
from .recipes import image_size_of, shape_of, steps_of

TITLES = {
    "stage_a": "Stage A",
    "stage_b": "Stage B with the compressor",
    "stage_c": "Stage C with its text encoder",
    "single_stage": "single stage with its text encoder",
}

METHOD = f"""\
Both models are trained on the same pictures, the single stage in Stage A's latents and Stage C in the embeddings of
Stage B's compressor. Loss, weights, text encoder, averaging of weights, sampling steps and guidance are the same, as in
their recipes. The single stage has as many steps as take the training FLOPs of Stage B and Stage C together. FLOPs are
counted per step by the stages. Stage A, which both need, and encoding the pictures once are not counted. Points before
the last are from the same run, whose learning rate has not decayed yet; a run of that length would do better, for both.
A ratio is taken where both first reach the smaller final score, interpolated linearly between points.
{VERDICTS}"""


def write_report(evidence: Evidence, jobs: int, command: str) -> Row:
    """Write both files and the figures; return the content of ``report.json``."""
    out = evidence.plan.out
    out.mkdir(parents=True, exist_ok=True)
    figures = draw_all(evidence, out)
    content = {
        "command": command,
        "image_size": image_size_of(evidence.plan.recipes),
        "seeds": len(evidence.seeds),
        "jobs": jobs,
        "jobs_done": len(evidence.outcomes),
        "hours": hours(evidence.outcomes),
        "score": evidence.score,
        "table": [
            {"model": model, "seed": seed, **point}
            for seed in evidence.seeds
            for model in (CASCADE, SINGLE)
            for point in evidence.points(model, seed)
        ],
        "claims": [claim.row((evidence, seed) for seed in evidence.seeds) for claim in CLAIMS],
        "equal_score": [_equal(evidence, seed, with_b) for seed in evidence.seeds for with_b in (False, True)],
        "costs": as_rows(evidence.costs),
        "training_flops": {stage: evidence.flops(stage) for stage in evidence.costs},
        "seconds_per_picture": evidence.seconds(),
        "compressions": [{"seed": seed, **row} for seed in evidence.seeds for row in evidence.compressions(seed)],
        "logged": [
            {"run": kind, "seed": seed, **outcome.values}
            for (kind, seed), outcome in evidence.outcomes.items()
            if kind in TITLES
        ],
        "released": released(),
        "a100_hours": a100_hours(),
    }
    write(out, content, _markdown(content, evidence, figures))
    return content


def _equal(evidence: Evidence, seed: int, with_b: bool) -> Row:
    equal = evidence.equal(seed, with_b)
    known = {} if equal is None else {"score": equal.score, "cascade": equal.first, "single_stage": equal.second}
    return {"seed": seed, "stage_b_counted": with_b, **known, "ratio": equal.ratio if equal else None}


def _markdown(content: Row, evidence: Evidence, figures: dict[str, str]) -> list[str]:
    parts = [
        _head(content, evidence),
        ["## Training FLOPs at equal score", "", *_ratios(content, evidence)],
        ["## Claims", "", *claims_table(content["claims"]), "", METHOD],
        ["## Points along the runs", "", *_points(content, evidence)],
        ["## Compression", "", *_compressions(content)],
        ["## Cost of each stage", "", *_costs(content, evidence)],
        ["## The released sizes", "", *_released(content)],
        ["## Figures", ""] + [f"![{shows}]({name})\n" for name, shows in figures.items()],
    ]
    return [line for part in parts for line in [*part, ""]]


def _head(content: Row, evidence: Evidence) -> list[str]:
    recipes, side = evidence.plan.recipes, content["image_size"]
    z = "x".join(map(str, shape_of(recipes["stage_b"], side)))
    return [
        "# Würstchen: the cascade compared with one stage of the same size",
        "",
        "Pernias, Rampas, Richter et al., ICLR 2024 ([arXiv 2306.00637](https://arxiv.org/abs/2306.00637)), at another",
        f"scale. Written by `{content['command']}`:",
        f"{content['jobs_done']} of {content['jobs']} jobs, {content['seeds']} seeds requested.",
        "",
        f"- Data: {'drawn shapes' if evidence.plan.pictures.drawn else evidence.plan.pictures.train}, {side} pixels; "
        f"z is {z}.",
        f"- Steps: Stage A {steps_of(recipes['stage_a']):,}, B {steps_of(recipes['stage_b']):,}, C "
        f"{steps_of(recipes['stage_c']):,}, single stage {baseline_steps(recipes, evidence.costs):,}.",
        f"- Time: {content['hours']} hours of processes, {machine()}.",
    ]


def _ratios(content: Row, evidence: Evidence) -> list[str]:
    if evidence.score is None:
        return [
            "Not judged: attributes can be read only from `builtin:shapes`, and FID needs Inception's weights",
            "(`--inception`). Only the logged losses, which are for different data and cannot be compared, and the",
            "PSNR of Stage B are left.",
            "",
            *_logged(content),
        ]
    lines = [
        "| seed | counted | score | cascade, FLOPs | single stage, FLOPs | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["equal_score"]:
        counted = "Stage B and Stage C" if row["stage_b_counted"] else "only Stage C: B already exists"
        if row["ratio"] is None:
            lines.append(f"| {row['seed']} | {counted} | | | | unknown |")
            continue
        score = abs(row["score"])
        numbers = f"{row['cascade']:.3g} | {row['single_stage']:.3g} | **{row['ratio']:.2f}**"
        lines.append(f"| {row['seed']} | {counted} | {score:.3f} | {numbers} |")
    return [*lines, "", *(line for seed in evidence.seeds for line in _never(evidence, seed))]


def _never(evidence: Evidence, seed: int) -> list[str]:
    """Return a line about whether the worse model reached the final score of the better one before its end."""
    ends = {"the cascade": evidence.final(CASCADE, seed), "the single stage": evidence.final(SINGLE, seed)}
    known = {name: end for name, end in ends.items() if end is not None}
    if len(known) < 2:
        return [f"Seed {seed}: runs are missing."]
    sign = -1 if evidence.score == "fid" else 1
    worse, better = sorted(known, key=lambda name: sign * known[name])
    if known[worse] == known[better]:
        return [f"Seed {seed}: both end at {known[better]:.3f}."]
    best = max(y for _, y in evidence.curve(CASCADE if worse == "the cascade" else SINGLE, seed))
    never = "never reaches that" if best < sign * known[better] else "reached that before its end"
    return [f"Seed {seed}: {better} ends at {known[better]:.3f}; {worse} ends at {known[worse]:.3f} and {never}."]


def _logged(content: Row) -> list[str]:
    lines = ["| run | seed | final values |", "|---|---|---|"]
    for row in content["logged"]:
        values = [f"{name} {value:.4g}" for name, value in row.items() if name not in ("run", "seed")]
        lines.append(f"| {TITLES[row['run']]} | {row['seed']} | {', '.join(values)} |")
    return lines


def _points(content: Row, evidence: Evidence) -> list[str]:
    names = ["all", "seen", "unseen", *Shape._fields] if evidence.score == "all" else [evidence.score or ""]
    if not content["table"]:
        return ["None."]
    lines = [
        "Averaged weights. *all* is the share of pictures in which every attribute is correct, *seen* and *unseen* are",
        "the same for combinations with and without training pictures. The other columns are for single attributes.",
        "",
    ]
    lines += [
        f"| model | seed | steps | training FLOPs | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    for row in content["table"]:
        scores = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {TITLES[row['model']]} | {row['seed']} | {row['steps']:,} | {row['flops']:.3g} | {scores} |")
    return lines


def _compressions(content: Row) -> list[str]:
    if not content["compressions"]:
        return ["None."]
    lines = [
        "Pictures drawn by Stage B from the true z of validation pictures. The last row of a seed is the recipe's",
        "whole run; the others are short runs.",
        "",
        "| z | times smaller per side | positions | numbers | seed | PSNR (dB) | SSIM | all attributes kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in content["compressions"]:
        z = "x".join(map(str, row["z"])) + (", whole run" if row["run"] == "stage_b" else "")
        kept = f"{row['all']:.3f}" if "all" in row else ""
        ratios = " | ".join(f"{row[name]:g}" for name in ("per_side", "positions", "numbers"))
        lines.append(f"| {z} | {ratios} | {row['seed']} | {row['psnr']:.2f} | {row['ssim']:.3f} | {kept} |")
    short = [row for row in content["compressions"] if row["run"] != "stage_b"]
    if short:
        ratio = breaks_at(short)
        where = "at no ratio tried" if ratio is None else f"from {ratio:g} per side on"
        lines += ["", f"The PSNR is more than {-LARGEST_COST:g} dB below that of the smallest ratio per side {where}."]
    return lines


def _costs(content: Row, evidence: Evidence) -> list[str]:
    lines = [
        "| stage | parameters trained | FLOPs per step | training FLOPs | FLOPs per picture drawn |",
        "|---|---|---|---|---|",
    ]
    for row in content["costs"]:
        total = content["training_flops"][row["stage"]]
        numbers = [
            f"{row['parameters']:,}",
            *(f"{n:.3g}" for n in (row["flops_per_step"], total, row["flops_per_picture"])),
        ]
        lines.append(f"| {TITLES[row['stage']]} | {' | '.join(numbers)} |")
    seconds = content["seconds_per_picture"]
    if seconds is None:
        return [*lines, "", "Seconds per picture were not measured."]
    b = seconds["stage_b_and_a"] - seconds["stage_a"]
    return [
        *lines,
        "",
        "Seconds per picture, eight at a time, one thread, on this machine (median of three): Stage C "
        f"{seconds['stage_c']:.3f}, Stage B {b:.3f}, Stage A {seconds['stage_a']:.4f}; cascade "
        f"{seconds['stage_c'] + seconds['stage_b_and_a']:.3f}, single stage and A {seconds['single_stage']:.3f}.",
    ]


def _released(content: Row) -> list[str]:
    lines = [
        "Counted, not timed: a picture of 1024 pixels, 60 steps of Stage C with guidance (120 passes), 12 of Stage B.",
        "",
        "| network | parameters | FLOPs per pass | passes per picture | FLOPs per picture |",
        "|---|---|---|---|---|",
    ]
    for row in content["released"]:
        flops = f"{row['flops_per_pass']:.3g} | {row['passes_per_picture']} | {row['flops_per_picture']:.3g}"
        lines.append(f"| {row['network']} | {row['parameters']:,} | {flops} |")
    hours = content["a100_hours"]
    runs = "; ".join(
        f"{run['steps']:,} x {run['batch']:,} at {run['side']} x {run['side']}: {run['flops']:.3g}"
        for run in hours["runs"]
    )
    return [
        *lines,
        "",
        f"Stage C's {hours['hours']:,} A100-hours are at most {hours['flops_at_most']:.3g} FLOPs (312e12 per second,",
        f"all the time), {hours['flops_at_mfu']:.3g} at {hours['mfu']:.0%} of that. Counted from its runs* (steps x",
        "batch x three forward passes of the released prior):",
        f"{runs};",
        f"together **{hours['flops_counted']:.3g} FLOPs**, {hours['mfu_counted']:.1%} of the maximum.",
        "This excludes the frozen compressor and text encoder, which process every picture, and recomputation.",
        "",
        "\\* from notes on the paper, not checked against its text.",
    ]
