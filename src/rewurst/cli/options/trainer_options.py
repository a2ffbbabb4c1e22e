"""Treatment of every argument of Lightning's Trainer, in ``rewurst fit`` and in code with our data modules."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, NamedTuple

Outcome = Literal["honoured", "refused", "not relevant"]


class Option(NamedTuple):
    """One argument of the Trainer.

    Attributes:
        outcome: Whether a value other than the default counts.
        meaning: What it does, or why not, in one sentence.
    """

    outcome: Outcome
    meaning: str


OPTIONS: dict[str, Option] = {
    "accelerator": Option("honoured", "If there is none of this kind, the error says what to pass."),
    "strategy": Option("honoured", "DDP and `rewurst.callbacks.FSDP` are tested; FSDP saves folders."),
    "devices": Option("honoured", "Every process reads its own rows of a global batch."),
    "num_nodes": Option("honoured", "As `devices`."),
    "precision": Option("honoured", "FSDP refuses `16-mixed`, which needs a loss scaler."),
    "logger": Option("honoured", "A run resumes with any logger, and with none; see below."),
    "callbacks": Option("honoured", "`--trainer.callbacks.NAME.ARGUMENT VALUE` changes one argument of one of them."),
    "fast_dev_run": Option("honoured", "That many global batches, outside of any run: nothing is resumed or written."),
    "max_epochs": Option("honoured", "An epoch is a pass over the new corpora; the first limit reached ends the run."),
    "min_epochs": Option("honoured", "`SaveOnSignal` stops earlier."),
    "max_steps": Option("honoured", "An absolute step: a resumed run trains only what is left."),
    "min_steps": Option("honoured", "`SaveOnSignal` stops earlier."),
    "max_time": Option("honoured", "The run ends after the batch in which the time is over."),
    "limit_train_batches": Option("honoured", "Micro-batches of an epoch; one that cuts a global batch is refused."),
    "limit_val_batches": Option("honoured", "Batches of each validation corpus."),
    "limit_test_batches": Option("honoured", "Batches of each validation corpus, which `test` reads."),
    "limit_predict_batches": Option("honoured", "Batches of each validation corpus, which `predict` reads."),
    "overfit_batches": Option("honoured", "Every epoch is the same micro-batches; whole global batches only."),
    "val_check_interval": Option("honoured", "Micro-batches, a fraction of an epoch, or a time."),
    "check_val_every_n_epoch": Option("honoured", "`null` counts `val_check_interval` over epochs."),
    "num_sanity_val_steps": Option("honoured", "The random states stay as they are."),
    "log_every_n_steps": Option("honoured", "Global batches."),
    "enable_checkpointing": Option("honoured", "Without checkpoints nothing can resume."),
    "enable_progress_bar": Option("honoured", "In a file or a pipe the bar is a line every ten seconds."),
    "enable_model_summary": Option("honoured", "As Lightning's."),
    "accumulate_grad_batches": Option("refused", "It follows from `global_batch_size`; another value is an error."),
    "gradient_clip_val": Option("honoured", "It wins over a module's `max_grad_norm`; Stage A refuses it."),
    "gradient_clip_algorithm": Option("honoured", "With `gradient_clip_val`."),
    "deterministic": Option("honoured", "As Lightning's."),
    "benchmark": Option("honoured", "As Lightning's."),
    "inference_mode": Option("honoured", "As Lightning's."),
    "use_distributed_sampler": Option("not relevant", "The data modules give every process its own rows."),
    "profiler": Option("honoured", "`Throughput` listens to it and passes everything on."),
    "detect_anomaly": Option("honoured", "As Lightning's."),
    "barebones": Option("honoured", "Without a logger, checkpoints and progress bar."),
    "plugins": Option("honoured", "Checkpoints are written whole or not at all, unless a plugin writes them."),
    "sync_batchnorm": Option("honoured", "As Lightning's."),
    "reload_dataloaders_every_n_epochs": Option("honoured", "A loader that is built again continues where it was."),
    "default_root_dir": Option("honoured", "Where a run without a logger is stored."),
    "enable_autolog_hparams": Option("honoured", "As Lightning's."),
    "model_registry": Option("honoured", "As Lightning's."),
}


def table() -> str:
    """Return the table in Markdown."""
    rows = [f"| `{name}` | {option.outcome} | {option.meaning} |" for name, option in OPTIONS.items()]
    return "\n".join(["| argument | | what it means here |", "|---|---|---|", *rows])


def write(path: Path) -> None:
    """Write the table into a page, between its two comments."""
    begin, _, rest = path.read_text("utf8").partition(" -->\n")
    _, end, after = rest.rpartition("<!-- end -->")
    path.write_text(f"{begin} -->\n\n{table()}\n\n{end}{after}", encoding="utf8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
