"""Continue the demo's Stage C on other shapes in other colors, and measure what it forgets.

Four runs begin with the demo's Stage C and learn the new pictures as configs/wuerstchen/continue_c.yaml says:
re-warmed without replay, with 5 and with 25 % of what they read being old pictures, and at a constant low learning
rate without replay, as one would without re-warming. Measured are the validation loss on old and new pictures, and
what pictures drawn for prompts show, read by the nearest of all drawable renderings of both families.

It needs what ``python examples/demo.py --only wuerstchen`` leaves. What is there already is not done again.

    python examples/continued_prior.py               # runs/continued_prior/report.json, report.md, losses.png
    python examples/continued_prior.py --prompts 0   # losses only
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import yaml
from demo import command
from report import COLORS

from rewurst.preparation.sources.pictures import shapes
from rewurst.reproduce.logged import scalars

CONFIG, BEGUN = Path("configs/wuerstchen/continue_c.yaml"), Path("configs/wuerstchen/shapes/stage_c.yaml")
DATA, OUT = Path("data/shapes-new"), Path("runs/continued_prior")
FAMILIES = {"old": "builtin:shapes", "new": "builtin:shapes-new"}
CORPORA = {"old": "seen", "new": "new"}  # what the config calls their validation corpora
VALIDATIONS = 7
STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))

Curve = list[tuple[int, float]]
Accuracy = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One way to continue: its name, the share of old pictures, and whether the learning rate is re-warmed."""

    name: str
    title: str
    share: float
    rewarmed: bool = True


RUNS = (
    Run("no_replay", "re-warmed, no replay", 0.0),
    Run("replay_5", "re-warmed, 5 % replay", 0.05),
    Run("replay_25", "re-warmed, 25 % replay", 0.25),
    Run("constant", "constant low rate, no replay", 0.0, rewarmed=False),
)


@dataclass(frozen=True)
class Result:
    """Logged values of a run: (steps since the start, loss) on old and new pictures, including the start."""

    run: Run
    losses: dict[str, Curve]
    share_read: float
    accuracy: Accuracy | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = _callback(_load(CONFIG), "LRRewarming")["length"]
    parser.add_argument("--steps", type=int, default=length, help=f"of each run, by default {length}")
    parser.add_argument("--prompts", type=int, default=96, help="pictures drawn of each family after each run")
    arguments = parser.parse_args()
    if not pictures.checkpoint("c").exists():
        sys.exit(f"{pictures.checkpoint('c')} is not there: python examples/demo.py --only wuerstchen makes it")
    prepare()
    cut = captions_cut(Path(pictures.DATA) / "tokenizer")
    for run in RUNS:
        fit(run, arguments.steps)
    judged = arguments.prompts > 0
    start = accuracy(pictures.export(command), OUT / "start.json", arguments.prompts) if judged else None
    results = [read(run, arguments) for run in RUNS]
    write(summarise(results, start) | {"steps": arguments.steps, "captions_cut": cut}, results, OUT)
    print((OUT / "report.md").read_text(encoding="utf8"))


def prepare() -> None:
    """Return new pictures, and their latents by the old compressor."""
    if not all((DATA / side / "index.json").exists() for side in ("train", "val", "unseen")):
        command("prepare", "images", FAMILIES["new"], "--out", str(DATA), "--overwrite")
    for side in ("train", "val"):
        options = ["--stage_b", str(pictures.checkpoint("b")), "--image_size", str(pictures.SIDE)]
        command("prepare", "latents", str(DATA / side), *options, "--out", str(DATA / "latents" / side))


def captions_cut(tokenizer: Path) -> float:
    """Share of the new captions that are longer than what the text encoder sees; says so where there are any."""
    from rewurst.modules.shared.text_encoder import fresh_text_encoder

    settings = _load(CONFIG)["model"]["init_args"]["text_encoder"]
    encoder = fresh_text_encoder(settings | {"tokenizer": str(tokenizer)})
    captions = [shapes.caption(shape) for shape in shapes.combinations(FAMILIES["new"])]
    lengths = [len(encoder.tokenizer(caption).input_ids) for caption in captions]
    cut = float(np.mean([length > encoder.length for length in lengths]))
    if cut:
        print(
            f"warning: {cut:.0%} of the new captions are cut: they have up to {max(lengths)} tokens, of which "
            f"{encoder.length} are seen; make {tokenizer} from the captions of both families, before Stage C is trained"
        )
    return cut


def fit(run: Run, steps: int) -> None:
    """Train a run with its own config, which is written next to its logs."""
    path = OUT / run.name / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config_of(run, steps), sort_keys=False), encoding="utf8")
    command("fit", "--config", str(path))


def config_of(run: Run, steps: int) -> dict[str, Any]:
    """Return the recipe with a run's learning rate and share, from Stage C's last step on."""
    config = _load(CONFIG)
    trainer, begun = config["trainer"], _load(BEGUN)["trainer"]["max_steps"]
    every = interval(begun, steps)
    data = config["data"]["init_args"]
    trainer |= {"max_steps": begun + steps, "logger": _part("TensorBoardLogger", save_dir=str(OUT), name=run.name)}
    trainer["val_check_interval"] = every * data["global_batch_size"] // data["micro_batch_size"]
    trainer["callbacks"] = [c for c in trainer["callbacks"] if c["class_path"] not in ("LogSamples", "Forgetting")]
    trainer["callbacks"].append(_part("Forgetting", old=[CORPORA["old"]], new=[CORPORA["new"]]))
    rewarming = _callback(config, "LRRewarming")
    rewarming["length"] = steps
    if not run.rewarmed:
        rewarming["schedule"] = _part("Constant", level=rewarming["schedule"]["init_args"]["minimum"])
    _callback(config, "ReplayScheduler")["share"] = run.share
    folder = str(OUT / run.name / "checkpoints")
    _callback(config, "ModelCheckpoint").update(dirpath=folder, every_n_train_steps=every)
    return config


def interval(begun: int, steps: int) -> int:
    """Return the steps between validations, counted from the very beginning: the last one has to be at the end."""
    common = math.gcd(begun, steps)
    return next(every for every in range(max(1, steps // VALIDATIONS), 0, -1) if common % every == 0)


def read(run: Run, arguments: argparse.Namespace) -> Result:
    """Read what a run logged, and what the pictures it draws show."""
    folder = OUT / run.name
    every = interval(_load(BEGUN)["trainer"]["max_steps"], arguments.steps)
    losses = {}
    for name, corpus in CORPORA.items():
        curve = scalars(folder, f"val/loss/{corpus}")
        kind, sign = ("forgetting", -1) if name == "old" else ("adaptation", 1)
        start = curve[-1][1] + sign * scalars(folder, f"{kind}/{corpus}")[-1][1]
        later = {round((step - curve[-1][0]) / every) * every + arguments.steps: loss for step, loss in curve}
        losses[name] = sorted((later | {0: start}).items())
    shares = scalars(folder, "replay/share_read")
    found = None
    if arguments.prompts:
        found = accuracy(export(run), folder / "accuracy.json", arguments.prompts)
    return Result(run, losses, shares[-1][1] if shares else 0.0, found)


def export(run: Run) -> Path:
    """Return a run's prior over the demo's Stages A and B."""
    folder = OUT / run.name / "pipeline"
    if not folder.exists():
        stages = [("a", pictures.checkpoint("a")), ("b", pictures.checkpoint("b"))]
        stages.append(("c", OUT / run.name / "checkpoints" / "last.ckpt"))
        options = [option for stage, path in stages for option in (f"--stage_{stage}", str(path))]
        command("export", "diffusers", *options, str(folder))
    return folder


def accuracy(folder: Path, kept: Path, count: int) -> Accuracy:
    """Share of the pictures drawn for prompts of each family in which each attribute, and all, are as asked for."""
    if kept.exists():
        found: Accuracy = json.loads(kept.read_text(encoding="utf8"))
        return found
    found = {}
    for name, family in FAMILIES.items():
        unseen = set(shapes.held_out(family))
        shown = [shape for shape in shapes.combinations(family) if shape not in unseen]
        asked = random.Random(0).sample(shown, count)
        found[name] = pictures.Drawn(asked, drawn(folder, asked)).right(tuple(FAMILIES.values()))
    kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf8")
    return found


def drawn(folder: Path, asked: Sequence[shapes.Shape]) -> np.ndarray[Any, Any]:
    """Pictures (n, 64, 64, 3) for prompts, as the config says they are drawn."""
    from rewurst.modules import TextToImage

    pipeline, settings = TextToImage.from_folder(folder), _load(CONFIG)["model"]["init_args"]
    images: list[Any] = []
    for first in range(0, len(asked), 48):
        prompts = [shapes.caption(shape) for shape in asked[first : first + 48]]
        side = {"height": pictures.SIDE, "width": pictures.SIDE, "seed": first}
        above = {"prior_num_inference_steps": settings["sampling_steps"]}
        images += pipeline(prompts, **side, **above, prior_guidance_scale=settings["guidance_scale"]).images
    return np.stack([np.asarray(image) for image in images])


def summarise(results: Sequence[Result], start: Accuracy | None) -> dict[str, Any]:
    """Return the report's numbers: losses at the start and the end, and the share of the rise that each run avoids.

    The rise is that of the loss on old pictures in the first run, which replays nothing.
    """
    begin = {name: curve[0][1] for name, curve in results[0].losses.items()}
    rise = results[0].losses["old"][-1][1] - begin["old"]
    runs = {}
    for result in results:
        ends = {name: curve[-1][1] for name, curve in result.losses.items()}
        taken = (rise - (ends["old"] - begin["old"])) / rise if rise > 0 else None
        runs[result.run.name] = {
            "title": result.run.title,
            "loss": ends,
            "old_rise": ends["old"] - begin["old"],
            "rise_taken_away": taken,
            "replay_share_asked": result.run.share,
            "replay_share_read": result.share_read,
            "accuracy": result.accuracy,
        }
    return {"start": {"loss": begin, "accuracy": start}, "runs": runs}


def write(summary: dict[str, Any], results: Sequence[Result], out: Path) -> None:
    """Write report.json, report.md and losses.png."""
    figure = out / "losses.png"
    draw_figure(results, figure)
    content = json.dumps(summary | {"figure": str(figure)}, indent=2)
    (out / "report.json").write_text(content + "\n", encoding="utf8")
    (out / "report.md").write_text(markdown(summary), encoding="utf8")


def markdown(summary: dict[str, Any]) -> str:
    """Two tables: losses, and what the pictures show."""
    begin = summary["start"]["loss"]
    lines = [
        "# A prior that keeps learning: new shapes in new colors",
        "",
        f"Validation loss after {summary['steps']} steps; one seed.",
        "",
        "| run | old pictures | old, against the start | share of the rise avoided | new pictures |",
        "|---|---|---|---|---|",
        f"| start | {begin['old']:.4f} | | | {begin['new']:.4f} |",
    ]
    for index, run in enumerate(summary["runs"].values()):
        taken = "" if index == 0 or run["rise_taken_away"] is None else f"{run['rise_taken_away']:.0%}"
        old, new = (run["loss"][name] for name in ("old", "new"))
        lines.append(f"| {run['title']} | {old:.4f} | {run['old_rise']:+.4f} | {taken} | {new:.4f} |")
    lines += ["", "![validation losses over steps](losses.png)", ""]
    judged = {"start": summary["start"]} | {run["title"]: run for run in summary["runs"].values()}
    judged = {title: run["accuracy"] for title, run in judged.items() if run["accuracy"] is not None}
    if judged:
        fields = [*shapes.Shape._fields, "all"]
        lines += [
            "Share of the pictures drawn for prompts in which what was asked for is read back, old / new shapes:",
            "",
            f"| run | {' | '.join(fields)} |",
            f"|---|{'---|' * len(fields)}",
        ]
    for title, found in judged.items():
        cells = [f"{found['old'][field]:.2f} / {found['new'][field]:.2f}" for field in fields]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_figure(results: Sequence[Result], path: Path) -> None:
    """Loss on old and new pictures over steps; runs differ by colour, line and marker."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    canvas, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True, layout="constrained")
    for panel, name in zip(panels, CORPORA, strict=True):
        for colour, (line, marker), result in zip(COLORS[1:], STYLES, results, strict=False):
            steps, losses = zip(*result.losses[name], strict=True)
            panel.plot(steps, losses, color=colour, linestyle=line, marker=marker, label=result.run.title)
        panel.axhline(results[0].losses[name][0][1], color="grey", linewidth=0.8, linestyle=":", label="start")
        panel.set(title=f"held-out {name} shapes", xlabel="steps since the end of Stage C")
        panel.set_ylabel("validation loss (weighted squared error of the noise)")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def _load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf8"))
    return content


def _callback(config: dict[str, Any], class_path: str) -> dict[str, Any]:
    """Arguments of one of a config's callbacks."""
    arguments: dict[str, Any] = next(
        c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"] == class_path
    )
    return arguments


def _part(class_path: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": arguments}


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    main()
