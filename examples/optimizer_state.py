"""Continue one checkpoint in three ways: resumed, re-warmed with the optimizer's state, re-warmed with a fresh one.

Uses the data that ``make demo`` prepared; writes docs/rewarming.png and prints the losses. By hand, in Python, what the
YAML of the demo says: ``python examples/optimizer_state.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from report import COLORS

from rewurst.callbacks import LRRewarming, StepProgressBar, WarmupCosine
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM

ROOT = Path(__file__).parent.parent
DATA = ROOT / "runs/demo/data"
CHECKPOINT = ROOT / "runs/optimizer_state/at_250.ckpt"
MODEL = {
    "model_type": "gpt_neox",
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
}


class Curves(Callback):
    """Keeps learning rate and losses in memory."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}
        self.train: dict[int, float] = {}
        self.val: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]
        self.train[trainer.global_step] = float(trainer.callback_metrics["train/loss"])

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self.val[trainer.global_step] = float(trainer.callback_metrics["val/loss/prose"])


def fit(dataset: str, max_steps: int, optimizer_state: Literal["reset", "keep"], ckpt_path: Path | None) -> Curves:
    seed_everything(0, verbose=False)
    data = TextDataModule(
        dataset, {"prose": Corpus(str(DATA / "prose/train"))}, {"prose": str(DATA / "prose/val")}, 128, 16, 16
    )
    curves = Curves()
    rewarming = LRRewarming(WarmupCosine(2e-3, 2e-4, 0.02), length=500, optimizer_state=optimizer_state)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=[rewarming, curves, StepProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        val_check_interval=25,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(CausalLM(MODEL), data, ckpt_path=ckpt_path, weights_only=True)
    if ckpt_path is None:
        trainer.save_checkpoint(CHECKPOINT)
    return curves


def main() -> None:
    runs = {"until step 250": fit("prose", 250, "reset", None)}
    runs["resumed"] = fit("prose", 500, "reset", CHECKPOINT)
    runs["re-warmed, state kept"] = fit("prose again", 500, "keep", CHECKPOINT)
    runs["re-warmed, state reset"] = fit("prose again", 500, "reset", CHECKPOINT)
    for name, run in runs.items():
        print(f"{name}: " + ", ".join(f"step {step} {loss:.3f}" for step, loss in run.val.items() if step % 50 == 0))
    draw(runs, ROOT / "docs/rewarming.png")


def draw(runs: dict[str, Curves], out: Path) -> None:
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    begin = next(iter(runs.values()))
    for (name, run), colour in zip(runs.items(), COLORS, strict=False):
        joined = run.val if run is begin else {max(begin.val): begin.val[max(begin.val)], **run.val}
        for panel, curve in zip(panels, (run.rates, run.train, joined), strict=True):
            panel.plot(list(curve), list(curve.values()), color=colour, label=name, linewidth=1.2)
    for panel, label in zip(panels, ("learning rate", "training loss (nats per token)", "held-out loss"), strict=True):
        panel.set(xlabel="step", ylabel=label)
        panel.grid(alpha=0.3)
    panels[1].set(xlim=(230, 300), ylim=(3.9, 4.8), title="around the restore")
    panels[2].set(xlim=(150, 505), ylim=(4.15, 4.95))
    panels[2].legend()
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main()
