"""Random states, checkpoints and signals: a stopped run resumes as if it had not been stopped."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rewurst import UsageError
from rewurst.callbacks import AtomicCheckpointIO, ExactResume, SaveOnSignal
from rewurst.callbacks.exact_resume import randomness, restore_randomness

pytestmark = pytest.mark.filterwarnings("ignore:.*dataloader is not resumable.*", "ignore:.*exists and is not empty")


class Noisy(LightningModule):
    """Module that draws from every generator in training and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.drawn: list[tuple[float, float, float]] = []

    def draw(self) -> tuple[float, float, float]:
        return (random.random(), float(np.random.rand()), float(torch.rand(())))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.append(self.draw())
        return self.weight + self.drawn[-1][2]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.draw()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Do(Callback):
    """Callback that calls a function once, after a number of batches."""

    def __init__(self, batches: int, action: Any) -> None:
        self.batches, self.action = batches, action

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            self.action(trainer)


def fit(steps: int, *callbacks: Callback, ckpt_path: Path | None = None, seed: int = 0, **options: Any) -> Noisy:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    module = Noisy()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[ExactResume(), *callbacks], logger=False,
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=3, check_val_every_n_epoch=None,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks), **options,
    )  # fmt: skip
    train, val = (DataLoader([torch.zeros(1)] * 100, generator=torch.Generator()) for _ in range(2))  # type: ignore[arg-type]
    trainer.fit(module, train, val, ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 9])
def test_a_resumed_run_draws_what_the_whole_one_draws(tmp_path: Path, stop: int) -> None:
    path = tmp_path / "a.ckpt"

    def save(trainer: Trainer) -> None:
        trainer.save_checkpoint(path)
        trainer.should_stop = True

    whole = fit(12)
    begun = fit(12, Do(stop, save))
    resumed = fit(12, ckpt_path=path, seed=99)
    assert begun.drawn + resumed.drawn == whole.drawn


def test_states_saved_within_a_global_batch_are_those_before_it(tmp_path: Path) -> None:
    saves = [Do(n, lambda trainer, n=n: trainer.save_checkpoint(tmp_path / f"{n}.ckpt")) for n in (4, 5, 7, 8)]
    fit(2, *saves, accumulate_grad_batches=4)
    kept = [torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["callbacks"]["ExactResume"] for n in (4, 5, 7, 8)]
    before, second, fourth, after = (state["ranks"][0]["torch"] for state in kept)
    assert torch.equal(second, before)
    assert torch.equal(fourth, before)
    assert not torch.equal(after, before)


@given(seed=st.integers(0, 2**32 - 1), draws=st.integers(0, 700))
@settings(max_examples=20, deadline=None)
def test_states_survive_a_checkpoint(seed: int, draws: int) -> None:
    import io

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(draws):
        random.gauss(0, 1), np.random.randn(), torch.randn(())
    file = io.BytesIO()
    torch.save(randomness(), file)
    module = Noisy()
    expected = [module.draw() for _ in range(3)]
    file.seek(0)
    restore_randomness(torch.load(file, weights_only=True))
    assert [module.draw() for _ in range(3)] == expected


def test_another_number_of_processes_is_refused_or_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(2, Do(2, lambda trainer: trainer.save_checkpoint(path)))
    content = torch.load(path, weights_only=True)
    content["callbacks"]["ExactResume"]["ranks"] *= 2
    torch.save(content, path)
    with pytest.raises(UsageError, match="holds random states of 2 processes and this run has 1: use as many, or"):
        fit(4, ckpt_path=path)


class TestAtomicCheckpointIO:
    def test_an_interrupted_save_keeps_the_previous_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "folder" / "last.ckpt"
        io = AtomicCheckpointIO()
        io.save_checkpoint({"step": 1}, path)

        def half(content: Any, file: Any) -> None:
            file.write(b"half")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", half)
            with pytest.raises(UsageError, match=r"last.ckpt cannot be written: \[Errno 28\] No space left on device"):
                io.save_checkpoint({"step": 2}, path)
        assert torch.load(path, weights_only=True) == {"step": 1}
        assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]

    def test_leftovers_of_a_killed_save_are_removed_by_the_next(self, tmp_path: Path) -> None:
        path = tmp_path / "last.ckpt"
        (tmp_path / ".last.ckpt.abc.tmp").write_bytes(b"half")
        (tmp_path / ".other.ckpt.abc.tmp").write_bytes(b"somebody else's")
        AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [".other.ckpt.abc.tmp", "last.ckpt"]

    def test_bytes_are_on_disk_before_the_name_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        sync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), sync(descriptor))[1])
        monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b))[1])
        AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
        assert order == ["sync", "rename", "sync"]
        assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o666 & ~_umask()

    def test_the_trainer_saves_through_it(self, tmp_path: Path) -> None:
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_last=True)
        fit(4, checkpoint, plugins=[AtomicCheckpointIO()])
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class TestSaveOnSignal:
    @pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_saves_at_the_end_of_the_global_batch_and_continues(
        self, tmp_path: Path, name: str, accumulate: int
    ) -> None:
        before = signal.getsignal(getattr(signal, name))
        send = Do(5, lambda trainer: os.kill(os.getpid(), getattr(signal, name)))
        checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=100)
        whole = fit(4, accumulate_grad_batches=accumulate)
        # Callbacks are called in order: the signal comes before SaveOnSignal looks at the batch.
        begun = fit(4 if accumulate > 1 else 8, send, SaveOnSignal(), checkpoint, accumulate_grad_batches=accumulate)
        assert len(begun.drawn) == (5 if accumulate == 1 else 8)
        assert signal.getsignal(getattr(signal, name)) == before
        if accumulate > 1:
            resumed = fit(4, checkpoint, ckpt_path=tmp_path / "signal.ckpt", seed=5, accumulate_grad_batches=accumulate)
            assert begun.drawn + resumed.drawn == whole.drawn

    def test_bad_input(self) -> None:
        with pytest.raises(UsageError, match="there is no signal 'SIGTREM'"):
            SaveOnSignal(["SIGTREM"])

    def test_a_thread_cannot_take_signals(self) -> None:
        said: list[Any] = []

        def run() -> None:
            with pytest.warns(UserWarning, match="only a program's main thread can take signals") as warned:
                fit(2, SaveOnSignal())
            said.append(warned)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert len(said) == 1
