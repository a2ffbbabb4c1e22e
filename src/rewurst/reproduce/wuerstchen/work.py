"""Run a task of the comparison in its own process: latents, judging of checkpoints, or timing.

``python -m rewurst.reproduce.wuerstchen.work TASK.json`` writes ``done.json`` next to its task.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule

from ... import modules
from ...files import write_atomically
from ...modules import LatentDiffusion, StageB, StageC
from ...modules.networks.weight_files import read_file
from ...preparation.latents import prepare_latents
from .jobs import DONE
from .judging import draw_for_prompts, prompts_of, read_attributes, reconstructed, scored_by_fid

ROUNDS = 3
TIMED = 8  # pictures at a time

Task = dict[str, Any]


def main(path: Path) -> None:
    """Run a task."""
    task: Task = json.loads(path.read_text(encoding="utf8"))
    kinds: dict[str, Callable[[Task, Path], Task]] = {"latents": make_latents, "judge": judge, "timing": measure_time}
    write_atomically(path.with_name(DONE), json.dumps(kinds[task["kind"]](task, path.parent)) + "\n")


def make_latents(task: Task, folder: Path) -> Task:
    """Encode every picture with Stage B's compressor and Stage A, unless this is done already."""
    what = task["what"].split(",")
    for name, source in task["sources"].items():
        prepare_latents(source, folder / name, task["stage_b"], task["side"], what=what, progress=False)
    return {}


def judge(task: Task, folder: Path) -> Task:
    """Return the scores of every checkpoint of a run, or of Stage B's reconstructions; known scores are kept."""
    run = Path(task["run"])
    module = load_module(run)
    if isinstance(module, StageB):
        take_weights(module, run / "checkpoints" / "last.ckpt")
        return reconstructed(module, task["val"], task["side"], task["prompts"], task["drawn"])
    assert isinstance(module, StageC | LatentDiffusion)
    part = folder / "part.json"
    points: Task = json.loads(part.read_text(encoding="utf8")) if part.exists() else {}
    for step, path in checkpoints(run):
        if str(step) in points:
            continue
        take_weights(module, path)
        if task["drawn"]:
            asked = prompts_of(task["prompts"])
            points[str(step)] = read_attributes(asked, draw_for_prompts(module, asked, task["side"]))
        else:
            found = scored_by_fid(module, task["val"], task["side"], task["prompts"], task["inception"])
            points[str(step)] = found
        write_atomically(part, json.dumps(points))
    return {"points": points}


def measure_time(task: Task, folder: Path) -> Task:
    """Return each stage's seconds per picture: the median of a few rounds of several pictures on one thread."""
    torch.set_num_threads(1)
    c, single = (load_module(Path(task["runs"][stage])) for stage in ("stage_c", "single_stage"))
    assert isinstance(c, StageC)
    assert isinstance(single, LatentDiffusion)
    for module, stage in ((c, "stage_c"), (single, "single_stage")):
        take_weights(module, checkpoints(Path(task["runs"][stage]))[-1][1])
    side, captions = task["side"], ["a picture"] * TIMED
    size = c.compressor.module.latent_size((side, side))
    vqgan = single.stage_a.module
    inner = (side // vqgan.compression,) * 2
    z = c.draw_embeddings(captions, size)
    latents = single.draw_data(captions, (single.unet.config["c_in"], *inner), None)
    lower = c.lower_stages
    seconds = {
        "stage_c": _median(lambda: c.draw_embeddings(captions, size)),
        "stage_b_and_a": _median(lambda: lower.draw(z, captions, None, c.stage_b_steps)),
        "stage_a": _median(lambda: vqgan.to_images(latents)),
        "single_stage": _median(lambda: single.draw(captions, inner)),
    }
    return {"seconds_a_picture": seconds, "at_once": TIMED, "threads": 1, "cores": task["cores"]}


@torch.no_grad()
def _median(draw: Callable[[], object]) -> float:
    draw()
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        draw()
        taken.append((time.perf_counter() - begin) / TIMED)
    return statistics.median(taken)


def load_module(run: Path) -> LightningModule:
    """Return a run's module with fresh weights."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf8"))["model"]
    module: LightningModule = getattr(modules, config["class_path"].rsplit(".", 1)[-1])(**config["init_args"])
    return module.eval()


def take_weights(module: LightningModule, path: Path) -> None:
    """Load a checkpoint's weights, the averaged ones if it has any."""
    module.load_state_dict(read_file(path)["state_dict"])


def checkpoints(run: Path) -> Sequence[tuple[int, Path]]:
    """Return a run's checkpoints and the steps in their names, in order."""
    found = [(match, path) for path in run.rglob("*.ckpt") if (match := re.fullmatch(r"step=(\d+)\.ckpt", path.name))]
    return sorted((int(match[1]), path) for match, path in found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
