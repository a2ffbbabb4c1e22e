"""Run both halves on this machine: learn prose, then code, with and without replay; then pictures from text.

Every step is a command that you can type; it is printed when it runs. Finished steps are not repeated, so a stopped
demo resumes.

    python examples/demo.py                       # three language-model runs, then Stages A, B and C (pictures.py)
    python examples/demo.py --only continual      # one half; or --only wuerstchen
    python examples/demo.py --runs all            # and replay of 1, 10, 25 and 50 %

Reports are written under runs/demo; the stages' runs and data are where their configs say.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pictures
import report

CONFIGS = Path("configs/continual")
OUT = Path("runs/demo")  # what the configs name
SEQUENCE_LENGTH = 128
HELD_OUT = {"prose": 0.05, "code": 0.03}
PROMPT = "def __init__(self"


@dataclass(frozen=True)
class Run:
    """A training run: its name, configs over the first one, and further options."""

    name: str
    title: str
    configs: tuple[str, ...] = ()
    options: list[str] = field(default_factory=list)
    share: float = 0.0


START = Run("start", "prose only")
NO_REPLAY = Run("no_replay", "then code, no replay", ("demo_no_replay.yaml",))
REPLAY = Run("replay", "then code, 5 % replay", ("demo_replay.yaml",), share=0.05)


def replay_of(share: float) -> Run:
    name = f"replay_{share:g}"
    options = ["--trainer.callbacks.share", f"{share:g}", "--trainer.logger.name", name]
    return Run(name, f"then code, {share * 100:g} % replay", ("demo_replay.yaml",), options, share)


RUNS = {"demo": [START, NO_REPLAY, REPLAY]}
RUNS["all"] = [START, NO_REPLAY, replay_of(0.01), REPLAY, *map(replay_of, (0.1, 0.25, 0.5))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", choices=sorted(RUNS), default="demo", help="which runs")
    parser.add_argument("--only", choices=("continual", "wuerstchen"), help="one half")
    arguments = parser.parse_args()
    os.chdir(Path(__file__).parent.parent)
    OUT.mkdir(parents=True, exist_ok=True)
    if arguments.only != "wuerstchen":
        continual(RUNS[arguments.runs])
    if arguments.only != "continual":
        summary = pictures.run(command, OUT)
        report.add(OUT, "wuerstchen", summary, pictures.markdown(summary))
    print((OUT / "report.json").read_text(encoding="utf8"))
    print(f"{OUT / 'report.md'}: tables, figures and samples. The curves: tensorboard --logdir runs")


def continual(runs: list[Run]) -> None:
    begin = time.monotonic()
    prepare(OUT / "data")
    for run in runs:
        configs = [option for name in ("demo.yaml", *run.configs) for option in ("--config", str(CONFIGS / name))]
        command("fit", *configs, *run.options)
    samples = {run.name: export(run.name) for run in runs}
    results = [report.read(run.name, run.title, OUT / run.name, run.share) for run in runs]
    report.write(results, samples, PROMPT, OUT, time.monotonic() - begin)


def prepare(data: Path) -> None:
    """One tokenizer over both corpora, then each corpus as shards with a held-out part."""
    tokenizer = data / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        sources = ["builtin:prose", "builtin:code"]
        command("prepare", "tokenizer", *sources, "--vocab_size", "2048", "--out", str(tokenizer))
    for corpus, share in HELD_OUT.items():
        out = data / corpus
        if not (out / "train" / "index.json").exists() or not (out / "val" / "index.json").exists():
            options = ["--tokenizer", str(tokenizer), "--sequence_length", str(SEQUENCE_LENGTH), "--overwrite"]
            command("prepare", "text", f"builtin:{corpus}", "--out", str(out), "--held_out", str(share), *options)


def export(run: str) -> str:
    """Write the run's model as a Hugging Face folder and let it continue the prompt."""
    from rewurst.checkpoints.newest import newest_checkpoint
    from rewurst.modules.language.generation import generate_text

    folder = OUT / "hf" / run
    command("export", "hf", str(newest_checkpoint([OUT / run])), str(folder), "--overwrite")
    return generate_text(str(folder), PROMPT, max_new_tokens=80)


def command(*args: str) -> None:
    """Run a command line of rewurst in this process, as it would run in a shell."""
    from rewurst.train import main as rewurst

    print(f"\n$ rewurst {shlex.join(args)}", flush=True)
    status = rewurst(args)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
