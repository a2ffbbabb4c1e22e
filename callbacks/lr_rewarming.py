"""The learning rate of a run that goes on: re-warmed for a new dataset, continued for the same one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from .. import UsageError
from . import schedules
from .lengths import in_steps, parse_length
from .schedule_types import InfiniteCosine, Schedule, describe


class LRRewarming(Callback):
    """Owns the learning rate of any LightningModule, with automatic or manual optimization.

    What is being learnt has a name, the **dataset**: the data module's attribute ``dataset``, or the argument here. A
    checkpoint keeps it with the step at which it began. Restored under the same name, the run goes on as if it had
    never stopped. Restored under another name, or from a checkpoint that never saw this callback, the schedule begins
    anew at the restored step: the learning rate is re-warmed and re-decayed (Gupta et al. 2023; Ibrahim et al. 2024).
    A schedule that never ends (:class:`InfiniteCosine`) instead goes on in its constant phase.

    Needs of the module: optimizers, and no LR scheduler beside them. Groups that begin with different learning rates
    keep their ratios to the first group of the first optimizer. ``trainer.max_steps`` is absolute: to learn a new
    dataset for ``length`` more steps, set it to the restored step plus ``length``.

    Args:
        schedule: Value by step, such as ``WarmupCosine(peak=3e-4, minimum=3e-5)``.
        length: Length of the schedule on this dataset, in steps (700) or tokens ("300B tokens"). A step is one
            completed global batch. After it the last value stays.
        dataset: Name of what is being learnt, where the data module has no attribute ``dataset``.
        optimizer_state: ``"reset"`` begins a new dataset with a fresh optimizer (the papers' choice); ``"keep"`` keeps
            moments and counts.
        constant_extension: Lengthens the constant phase of a schedule that never ends, in steps or tokens. It may be
            raised from run to run of the same dataset.
        anneal_length: From a checkpoint in the constant phase: anneal now, within this length (for a release).

    Raises:
        UsageError: See the messages; each names the value and what would be right.

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
        self._dataset: str | None = None
        self._start: int | None = None
        self._continues = False
        self._anneal_start: int | None = None
        self._scales: list[list[float]] | None = None
        self._stepped = False

    @property
    def length(self) -> int:
        """Length of the schedule in steps, known once a fit has been set up."""
        return self._length

    @property
    def start_step(self) -> int:
        """The step at which this dataset began."""
        assert self._start is not None
        return self._start

    def value(self, step: int) -> float:
        """Learning rate of the first group at an absolute step."""
        position = step - self.start_step
        if isinstance(self.schedule, InfiniteCosine):
            return self._never_ending_value(self.schedule, position)
        return float(self.schedule.value(position, self._length))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the dataset's name and the length, and moves to the front of the callbacks."""
        if stage != "fit":
            return
        if sum(isinstance(callback, LRRewarming) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise UsageError("two LRRewarming callbacks: one owns the learning rate of every optimizer")
        # A LearningRateMonitor that stands before this callback would log the value of the step before.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        dataset = self._settle_dataset(getattr(datamodule, "dataset", None))
        if dataset != self._dataset:
            self._dataset, self._start, self._anneal_start = dataset, None, None
        length, extension, anneal = self._asked
        self._length = in_steps(length, datamodule)
        self._extension = 0 if extension is None else in_steps(extension, datamodule, "constant_extension")
        self._anneal_length = None if anneal is None else in_steps(anneal, datamodule, "anneal_length")

    def state_dict(self) -> dict[str, Any]:
        """Dataset, start step, step, schedule and length: plain values only."""
        return {
            "dataset": self._dataset,
            "start_step": self._start,
            "step": self.step,
            "schedule": self.schedule.state(),
            "length": self._length,
            "continues": self._continues,
            "constant_extension": self._extension,
            "anneal": None if self._anneal_start is None else [self._anneal_start, self._anneal_length],
            "scales": self._scales,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Decides between continuing and re-warming while the optimizer's state can still be left out."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None:
            self.step, self._scales = state["step"], state["scales"]
        same = state is not None and state["dataset"] == self._dataset
        self._refuse_no_step(trainer, checkpoint["global_step"], same)
        if same:
            self._continue(state)
            return
        self._start = None
        self._continues = self._goes_on_in_constant_phase(state)
        if self.optimizer_state == "reset" and not self._continues:
            # Lightning pairs optimizers with these states: with none there, the fresh ones stay as configured.
            checkpoint["optimizer_states"] = []
        checkpoint["lr_schedulers"] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fixes the start step of a new dataset and the scales of the parameter groups."""
        if trainer.lr_scheduler_configs:
            name = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            raise UsageError(f"{name} beside LRRewarming: two owners of the learning rate, take one of them out")
        if self._start is None:
            self._begin(trainer)
        if self._scales is None or len(self._scales) != len(trainer.optimizers):
            self._scales = _scales(trainer.optimizers)
        self._set(trainer)  # monitors log at the start of an epoch too, before any batch
        end = self.start_step + self._length + self._extension
        if self._anneal_start is None and 0 < end < trainer.max_steps and len(trainer.optimizers) == 1:
            rank_zero_warn(
                f"max_steps {trainer.max_steps} goes beyond the schedule, which ends at step {end}: "
                f"the learning rate stays at {self.value(end):g} from there"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the learning rate early, so that monitors log what the step will use."""
        self._set(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sets the learning rate that the step uses, whatever a module did to it in between."""
        self._set(trainer)
        self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts a step where any optimizer stepped: several optimizers and accumulation count a global batch once."""
        self.step += self._stepped
        self._stepped = False

    def _settle_dataset(self, of_data: str | None) -> str:
        if of_data is not None and self._argument is not None and of_data != self._argument:
            raise UsageError(f"dataset {self._argument!r} of LRRewarming differs from the data module's {of_data!r}")
        dataset = of_data if of_data is not None else self._argument
        if not dataset:
            raise UsageError('the data module names no dataset: say what is being learnt, LRRewarming(dataset="...")')
        return dataset

    def _refuse_no_step(self, trainer: Trainer, global_step: int, same: bool) -> None:
        if not 0 <= trainer.max_steps <= global_step:
            return
        what = "is complete" if same else "would do no step"
        more = "a larger value" if same else f"{global_step + self._length} for {self._length} more steps"
        raise UsageError(
            f"dataset {self._dataset!r} {what}: the checkpoint is at step {global_step} and trainer.max_steps "
            f"{trainer.max_steps} is absolute; set it to {more}"
        )

    def _continue(self, state: dict[str, Any]) -> None:
        """Takes the kept run over, refusing other numbers under the same name."""
        kept = f"{describe(state['schedule'])} over {state['length']} steps"
        asked = f"{self.schedule.describe()} over {self._length} steps"
        if kept != asked:
            raise UsageError(
                f"dataset {self._dataset!r} was begun with {kept}, now it is {asked}: keep the numbers, "
                "or give what is new another dataset name"
            )
        if self._extension < state["constant_extension"]:
            raise UsageError(
                f"constant_extension {self._extension} of dataset {self._dataset!r} was "
                f"{state['constant_extension']} steps already: it can only grow"
            )
        self._start, self._continues = state["start_step"], state["continues"]
        self._continue_annealing(state)

    def _continue_annealing(self, state: dict[str, Any]) -> None:
        position = self.step - self.start_step
        if state["anneal"] is not None:
            self._anneal_start, length = state["anneal"]
            if self._anneal_length != length:
                raise UsageError(f"anneal_length {self._anneal_length} steps differs from the {length} it began with")
        elif self._anneal_length is not None:
            self._require_constant_phase(state, "anneal_length: annealing")
            self._anneal_start = self.step
        if isinstance(self.schedule, InfiniteCosine) and self._extension > state["constant_extension"]:
            end = self.schedule.constant_phase(self._length)[1] + state["constant_extension"]
            if position > end:
                raise UsageError(f"constant_extension: the constant phase ended at step {self.start_step + end} already")

    def _goes_on_in_constant_phase(self, state: dict[str, Any] | None) -> bool:
        if state is None or not self.schedule.never_ends or state["schedule"]["name"] != type(self.schedule).__name__:
            return False
        self._require_constant_phase(state, f"dataset {self._dataset!r}")
        return True

    def _require_constant_phase(self, state: dict[str, Any], what: str) -> None:
        """A new dataset, or an annealing, begins within the constant phase and nowhere else."""
        assert isinstance(self.schedule, InfiniteCosine)
        numbers = {key: value for key, value in state["schedule"].items() if key != "name"}
        first, end = type(self.schedule)(**numbers).constant_phase(state["length"])
        first = state["start_step"] + (0 if state["continues"] else first)
        end = state["start_step"] + end + state["constant_extension"]
        if not first <= state["step"] <= end or state["anneal"] is not None:
            raise UsageError(
                f"{what} must begin in the constant phase of {state['dataset']!r}, steps {first} to {end}: "
                f"the checkpoint is at step {state['step']}" + (", annealed" if state["anneal"] or state["step"] > end else "")
            )

    def _begin(self, trainer: Trainer) -> None:
        """The current step becomes the first of the dataset."""
        if not self.step:
            # No state of ours in the checkpoint: Lightning counts every optimizer's steps.
            self.step = trainer.global_step // max(len(trainer.optimizers), 1)
        self._start = self.step
        if self._anneal_length is not None:
            raise UsageError("anneal_length needs a checkpoint in the constant phase of the same dataset")
        if self.optimizer_state == "reset" and not self._continues:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()  # strategies that restore it by themselves have done so by now
        rank_zero_info(f"dataset {self._dataset!r} begins at step {self._start}: {self.schedule.describe()}")

    def _never_ending_value(self, schedule: InfiniteCosine, position: int) -> float:
        if self._anneal_start is not None and self._anneal_length is not None:
            since = position + self.start_step - self._anneal_start
            if since >= 0:
                return float(schedules.exponential(since, self._anneal_length, schedule.constant, schedule.minimum))
        first, end = schedule.constant_phase(self._length)
        if self._continues:
            position = max(position, first)
        if position >= end:
            position = max(end, position - self._extension)
        return float(schedule.value(position, self._length))

    def _set(self, trainer: Trainer) -> None:
        assert self._scales is not None
        value = self.value(self.step)
        for optimizer, scales in zip(trainer.optimizers, self._scales, strict=True):
            for group, scale in zip(optimizer.param_groups, scales, strict=True):
                if isinstance(group["lr"], torch.Tensor):  # compiled optimizers read the tensor in place
                    group["lr"].fill_(value * scale)
                else:
                    group["lr"] = value * scale


def _scales(optimizers: list[Optimizer]) -> list[list[float]]:
    """Learning rates as multiples of the first group's, before any schedule touched them."""
    initial = [[float(group.get("initial_lr", group["lr"])) for group in groups] for groups in _groups(optimizers)]
    reference = initial[0][0]
    if reference == 0:
        raise UsageError("the first parameter group begins with a learning rate of 0: no ratio to the others exists")
    return [[lr / reference for lr in group] for group in initial]


def _groups(optimizers: list[Optimizer]) -> Iterator[list[dict[str, Any]]]:
    return (optimizer.param_groups for optimizer in optimizers)
