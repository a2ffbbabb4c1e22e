"""Continuations of fixed prompts by a language model during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from ... import UsageError
from ...checkpoints.runs import run_folder
from .validation_batches import ValidationCallback


class LogText(ValidationCallback):
    """Callback that lets the module continue fixed prompts at validations and logs the texts.

    The module must have ``continue_text(prompts, max_new_tokens, temperature) -> list[str]``, which returns the
    continuations without the prompts. It is called on every process, with the weights that are validated, such as
    averaged ones. Random numbers are the same every time, and the global generator's state is restored.

    The text goes to TensorBoard's Text tab under ``samples/text``, to loggers with ``log_text`` (Weights & Biases) as a
    table, and as a Markdown file to the folder ``samples`` in the logger's folder.

    Args:
        prompts: Texts to continue.
        max_new_tokens: Maximum number of tokens added to each.
        temperature: Temperature of sampling; 0 always takes the most likely token, higher values vary more.
        every_n_steps: Minimum number of global batches between texts, checked at validations (default: a text at
            every validation).

    Raises:
        UsageError: A number is out of range, there are no prompts, or the module does not generate text.

    Example::

        Trainer(callbacks=[LogText(["def main(", "The value of"], every_n_steps=1000)])
    """

    def __init__(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 50,
        temperature: float = 0.8,
        every_n_steps: int | None = None,
    ) -> None:
        if not prompts:
            raise UsageError("LogText: give at least one prompt")
        if max_new_tokens < 1 or temperature < 0 or (every_n_steps is not None and every_n_steps < 1):
            raise UsageError(
                f"LogText: max_new_tokens {max_new_tokens} and every_n_steps {every_n_steps} must be at least 1, "
                f"temperature {temperature} at least 0"
            )
        self.prompts, self.max_new_tokens, self.temperature = list(prompts), max_new_tokens, temperature
        self.every_n_steps = every_n_steps
        self._written_at: int | None = None
        self._folder: Path | None = None

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, which allows several of these callbacks."""
        settings = {"prompts": self.prompts, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        return self._generate_state_key(**settings, every=self.every_n_steps)

    @property
    def _legacy_state_key(self) -> Any:
        return type(self).__name__  # the key in older checkpoints, which allowed only one

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last text."""
        return {"written_at": self._written_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last text."""
        self._written_at = state_dict["written_at"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module can generate text, and let all processes agree on the folder."""
        self._folder = run_folder(trainer)
        if not callable(getattr(pl_module, "continue_text", None)):
            raise UsageError(
                f"LogText: {type(pl_module).__name__} has no continue_text(prompts, ...) that returns texts"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate and log texts if they are due."""
        step = self.completed_steps(trainer)
        if trainer.sanity_checking or not self._is_due(trainer, step):
            return
        devices = [pl_module.device.index or 0] if pl_module.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            texts = pl_module.continue_text(self.prompts, self.max_new_tokens, self.temperature)  # type: ignore[operator]
        self._written_at = step
        if trainer.is_global_zero:
            self._log(trainer, texts, step)

    def _log(self, trainer: Trainer, texts: Sequence[str], step: int) -> None:
        page = "\n\n".join(_block(prompt, text) for prompt, text in zip(self.prompts, texts, strict=True))
        if self._folder is not None:
            folder = self._folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"text-step={step:07d}.md").write_text(page + "\n", encoding="utf8")
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):
                rows = [[step, prompt, text] for prompt, text in zip(self.prompts, texts, strict=True)]
                logger.log_text(key="samples/text", columns=["step", "prompt", "text"], data=rows, step=step)
                continue
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_text"):
                experiment.add_text("samples/text", page, step)

    def _is_due(self, trainer: Trainer, step: int) -> bool:
        if self.every_n_steps is None or self._written_at is None or trainer.state.fn != "fit":
            return True
        return step // self.every_n_steps > self._written_at // self.every_n_steps


def _block(prompt: str, text: str) -> str:
    """Format a prompt and its continuation as an indented block, which no character in it can end."""
    return "\n".join(f"    {line}" for line in f"{prompt}▸{text}".splitlines())
