"""Learning rate of a resumed run: re-warmed for a new dataset, continued for the same one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from ... import UsageError
from ..optimizer_steps import StepCallback
from .dataset_schedule import DatasetRun
from .lengths import TO_MAX_STEPS, counted_optimizers, in_steps, parse_length
from .schedule_types import InfiniteCosine, Schedule, initial_rates


class LRRewarming(StepCallback):
    """Callback that sets the learning rate of any LightningModule, with automatic or manual optimization.

    The data being learned has a name, the **dataset**: the data module's attribute ``dataset``, or the argument here.
    Checkpoints store it with the step at which it began. A run restored under the same name continues as if it had
    never stopped. If it is restored under a different name, or from a checkpoint without this callback, the schedule
    restarts at the restored step: the learning rate is re-warmed and re-decayed (Gupta et al. 2023; Ibrahim et al.
    2024). A schedule that never ends (:class:`InfiniteCosine`) continues in its constant phase instead.

    The module must have optimizers and no LR scheduler. Groups with different initial learning rates keep their ratios
    to the first group of the first optimizer. ``trainer.max_steps`` is absolute: to learn a new dataset for ``length``
    more steps, set it to the restored step plus ``length``.

    Args:
        schedule: Schedule of the learning rate, such as ``WarmupCosine(peak=3e-4, minimum=3e-5)``.
        length: Length of the schedule on this dataset, in steps (700), tokens ("300B tokens") or passes over the new
            corpora ("1 epoch"), or "to max_steps". A step is one completed global batch. The last value stays after it.
        dataset: Name of the data being learned, if the data module has no attribute ``dataset``.
        optimizer_state: ``"reset"`` to begin a new dataset with a new optimizer (the papers' choice), ``"keep"`` to
            keep moments and counts. If a schedule continues in its constant phase, the optimizer continues too.
        constant_extension: Steps or tokens to add to the constant phase of a schedule that never ends. It may be
            raised from run to run of the same dataset.
        anneal_length: Length of an annealing (for a release) that begins now, at a checkpoint in the constant phase.

    Raises:
        UsageError: An argument or a checkpoint does not fit; the message names the value and what is expected.

    Example::

        Trainer(max_steps=2000, callbacks=[LRRewarming(WarmupCosine(3e-4, 3e-5), length=1000, dataset="code")]).fit(
            module, loader, ckpt_path="prose-step=1000.ckpt"
        )
    """

    def __init__(
        self,
        schedule: Schedule,
        length: int | str,
        dataset: str | None = None,
        optimizer_state: Literal["reset", "keep"] = "reset",
        constant_extension: int | str | None = None,
        anneal_length: int | str | None = None,
    ) -> None:
        if length != TO_MAX_STEPS:
            parse_length(length)
        if optimizer_state not in ("reset", "keep"):
            raise UsageError(f'optimizer_state {optimizer_state!r} must be "reset" or "keep"')
        for name, value in (("constant_extension", constant_extension), ("anneal_length", anneal_length)):
            if value is not None and not isinstance(schedule, InfiniteCosine):
                raise UsageError(f"{name} {value!r}: {type(schedule).__name__} has no constant phase")
        self.schedule = schedule
        self.optimizer_state = optimizer_state
        self.step = 0
        self._asked = (length, constant_extension, anneal_length)
        self._argument = dataset
        self._run: DatasetRun | None = None
        self._scales: list[list[float]] | None = None
        self._restored = False

    @property
    def run(self) -> DatasetRun:
        """Schedule of the current dataset, known after ``setup``."""
        assert self._run is not None
        return self._run

    def value(self, step: int) -> float:
        """Return the learning rate of the first group at an absolute step."""
        return self.run.value(step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Determine the dataset's name and the length, and move to the front of the callbacks."""
        if stage != "fit":
            return
        # A LearningRateMonitor before this callback would log the previous step's value.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        dataset = self._settle_dataset(getattr(datamodule, "dataset", None))
        run = self._as_run(dataset, datamodule)
        self._restored = False
        before, self._run = self._run, run
        self._reach_max_steps(trainer, 0, 1)
        if before is None or trainer.global_step == 0:
            return
        if before.dataset == dataset:  # a second fit in one process continues
            run.start, run.continues, run.anneal_start = before.start, before.continues, before.anneal_start
        else:
            run.follow(before.state(), self.step)

    def state_dict(self) -> dict[str, Any]:
        """Return dataset, start step, step, schedule and length, as plain values."""
        return {**self.run.state(), "step": self.step, "scales": self._scales}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Decide whether to continue or re-warm, while the optimizer's state can still be left out."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None:
            self.step, self._scales, self._restored = state["step"], state["scales"], True
        same = state is not None and state["dataset"] == self.run.dataset
        start = state["start_step"] if same else self.step
        self._reach_max_steps(trainer, start, len(checkpoint.get("optimizer_states", [])))
        self._refuse_no_step(trainer, checkpoint, same)
        if same:
            self.run.resume(state, self.step)
            return
        self.run.follow(state, self.step)
        if self._resets:
            # Lightning pairs optimizers with these states; without states, new optimizers stay as configured.
            checkpoint["optimizer_states"] = []
            self._scales = None
        checkpoint["lr_schedulers"] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Determine the start step of a new dataset and the scales of the parameter groups."""
        super().on_train_start(trainer, pl_module)
        if trainer.lr_scheduler_configs:
            name = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            raise UsageError(f"{name} and LRRewarming both set the learning rate: remove one of them")
        if trainer.global_step == 0 and not self._restored:  # this object may have been used in a run before
            self.step, self.run.start, self._scales = 0, None, None
        if self.run.start is None:
            self._begin(trainer)
        if self._scales is None or len(self._scales) != len(trainer.optimizers):
            self._scales = _scales(trainer.optimizers)
        self._set(trainer)  # monitors also log at the start of an epoch, before any batch
        if self.run.end < trainer.max_steps and counted_optimizers(pl_module, len(trainer.optimizers)) == 1:
            rank_zero_warn(
                f"max_steps {trainer.max_steps} goes beyond the schedule of {self.run.dataset!r}, which ends at step "
                f"{self.run.end}: the learning rate stays at {self.value(self.run.end):g} after it"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the learning rate early, so that monitors log the value that the step will use."""
        self._set(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Set the learning rate that the step uses, even if the module has changed it in between."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._set(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step if any optimizer stepped, so that a global batch counts once with any number of optimizers."""
        self.step += self.take_stepped()

    def planned(self, datamodule: Any, max_steps: int = -1) -> DatasetRun:
        """Return the schedule as it would run from step 0, with the data module's tokens per step, for plots."""
        run = self._as_run(str(self._argument or getattr(datamodule, "dataset", "")), datamodule)
        run.start = 0
        if self._asked[0] == TO_MAX_STEPS:
            run.length = _require_max_steps(max_steps)
        return run

    def _as_run(self, dataset: str, datamodule: Any) -> DatasetRun:
        length, extension, anneal = self._asked
        return DatasetRun(
            dataset,
            self.schedule,
            1 if length == TO_MAX_STEPS else in_steps(length, datamodule),
            0 if extension is None else in_steps(extension, datamodule, "constant_extension"),
            None if anneal is None else in_steps(anneal, datamodule, "anneal_length"),
        )

    def _reach_max_steps(self, trainer: Trainer, start: int, optimizers: int) -> None:
        """Settle a length that was given as the rest of the run, from the step at which the dataset begins."""
        if self._asked[0] != TO_MAX_STEPS:
            return
        steps = _require_max_steps(trainer.max_steps) // counted_optimizers(trainer.lightning_module, optimizers)
        self.run.length = max(1, steps - start)

    def _settle_dataset(self, of_data: str | None) -> str:
        if of_data is not None and self._argument is not None and of_data != self._argument:
            raise UsageError(f"dataset {self._argument!r} of LRRewarming differs from the data module's {of_data!r}")
        dataset = of_data if of_data is not None else self._argument
        if not dataset:
            raise UsageError('the data module names no dataset: name what is being learned, LRRewarming(dataset="...")')
        return dataset

    def _refuse_no_step(self, trainer: Trainer, checkpoint: dict[str, Any], same: bool) -> None:
        global_step = checkpoint["global_step"]
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        if trainer.max_steps < 0 and trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
            raise UsageError(
                f"dataset {self.run.dataset!r} has no steps left to train: the checkpoint has finished {epochs} epochs "
                f"and trainer.max_epochs {trainer.max_epochs} is absolute; set it to a larger value"
            )
        if not 0 <= trainer.max_steps <= global_step:
            return
        held = len(checkpoint.get("optimizer_states", []))
        optimizers = counted_optimizers(trainer.lightning_module, held)  # max_steps counts each one's steps
        what = "is complete" if same else "has no steps left to train"
        more = f"{global_step + self.run.length * optimizers} for {self.run.length} more steps"
        more = "a larger value" if same else more
        raise UsageError(
            f"dataset {self.run.dataset!r} {what}: the checkpoint is at step {global_step} and trainer.max_steps "
            f"{trainer.max_steps} is absolute; set it to {more}"
        )

    @property
    def _resets(self) -> bool:
        """Whether to reset the optimizer; under a schedule that never ends it continues, as nothing is re-warmed."""
        return self.optimizer_state == "reset" and not self.run.continues

    def _begin(self, trainer: Trainer) -> None:
        """Make the current step the first of the dataset."""
        if not self.step:
            # The checkpoint has no state of this callback; Lightning counts every optimizer's steps.
            counted = counted_optimizers(trainer.lightning_module, len(trainer.optimizers))
            self.step = trainer.global_step // counted
        self.run.start = self.step
        self._reach_max_steps(trainer, self.step, len(trainer.optimizers))
        if self.run.anneal_length is not None:
            raise UsageError("anneal_length needs a checkpoint in the constant phase of the same dataset")
        if self._resets:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()  # strategies that restore it themselves have done so by now
        rank_zero_info(f"dataset {self.run.dataset!r} begins at step {self.step}: {self.schedule.describe()}")

    def _set(self, trainer: Trainer) -> None:
        assert self._scales is not None
        value = self.value(self.step)
        for optimizer, scales in zip(trainer.optimizers, self._scales, strict=True):
            for group, scale in zip(optimizer.param_groups, scales, strict=True):
                if isinstance(group["lr"], torch.Tensor):  # compiled optimizers read the tensor in place
                    group["lr"].fill_(value * scale)
                else:
                    group["lr"] = value * scale


def _require_max_steps(max_steps: int) -> int:
    if max_steps < 1:
        raise UsageError(f'length "{TO_MAX_STEPS}" needs trainer.max_steps; or write "1 epoch"')
    return max_steps


def _scales(optimizers: list[Optimizer]) -> list[list[float]]:
    """Return the initial learning rates, before any schedule, as multiples of the first group's."""
    initial = [initial_rates(optimizer) for optimizer in optimizers]
    reference = initial[0][0]
    if reference == 0:
        raise UsageError("the first parameter group begins with a learning rate of 0, so ratios to it do not exist")
    return [[lr / reference for lr in group] for group in initial]
