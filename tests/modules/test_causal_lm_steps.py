"""Steps of CausalLM: clipping, non-finite losses, compiled and recomputed blocks, two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_runs import rows_of
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from ranks import run_ranks
from stage_runs import logged_trainer as trainer
from torch import Tensor

from rewurst.callbacks import ExactResume, LRRewarming, StepProgressBar, Throughput, WarmupCosine
from rewurst.datamodules import TextDataModule
from rewurst.modules import CausalLM


@pytest.mark.parametrize(("every", "recomputed"), [(1, 3), (2, 2), (3, 1)])
def test_every_nth_block_is_recomputed(tiny_config: dict[str, Any], every: int, recomputed: int) -> None:
    torch.manual_seed(0)
    config = {**tiny_config, "num_hidden_layers": 3}
    module, ids = CausalLM(config), torch.randint(64, (2, 9))
    recomputing = CausalLM(config, activation_checkpointing=every)
    recomputing.load_state_dict(module.state_dict())
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    recomputing.loss(ids)  # the first one looks at the head
    for layer in recomputing.model.gpt_neox.layers:  # type: ignore[union-attr]
        layer.mlp.register_forward_pre_hook(count)  # type: ignore[union-attr]
    for each in (module, recomputing):
        each.loss(ids).backward()
    assert runs == 3 + recomputed
    for a, b in zip(module.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_blocks_are_compiled_one_by_one(
    tiny_config: dict[str, Any],
    data: Callable[..., TextDataModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_module, compiled = torch.nn.Module.compile, []

    def eagerly(self: torch.nn.Module) -> None:
        compiled.append(type(self).__name__)
        compile_module(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    curves = []
    for wanted in (False, True):
        torch.manual_seed(0)
        module = CausalLM(tiny_config, compile=wanted)
        names = list(module.state_dict())
        run = trainer(tmp_path, max_steps=2, val_check_interval=100)
        run.fit(module, data())
        assert list(module.state_dict()) == names
        curves.append(rows_of(run.logger, "train/loss"))
    assert compiled == ["GPTNeoXLayer"] * 2
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_tokens_are_counted_through_a_restore(
    tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "saved", filename="a", every_n_train_steps=3)
    options: dict[str, Any] = {"callbacks": [checkpoint], "enable_checkpointing": True, "val_check_interval": 100}
    first = trainer(tmp_path, max_steps=3, **options)
    first.fit(CausalLM(tiny_config), data())
    assert rows_of(first.logger, "tokens") == [32, 64, 96]
    second = trainer(tmp_path, max_steps=5, **options)
    second.fit(CausalLM(tiny_config), data(), ckpt_path=tmp_path / "saved" / "a.ckpt", weights_only=True)
    assert rows_of(second.logger, "tokens") == [128, 160]


def test_the_logged_loss_is_that_of_the_global_batch(
    tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    curves = []
    for micro_batch_size in (1, 4):
        torch.manual_seed(0)
        run = trainer(tmp_path, max_steps=4, val_check_interval=100)
        run.fit(CausalLM(tiny_config), data(micro_batch_size=micro_batch_size))
        curves.append(rows_of(run.logger, "train/loss"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "limit"), [({}, 0.01), ({"gradient_clip_val": 0.002}, 0.002), ({"gradient_clip_val": 0.0}, None)]
)
def test_gradients_are_clipped_to_the_requested_norm(
    tiny_config: dict[str, Any],
    data: Callable[..., TextDataModule],
    tmp_path: Path,
    setting: dict[str, Any],
    limit: float | None,
) -> None:
    norms = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            result = super().step(closure)
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))))
            return result

    module = CausalLM(tiny_config, optimizer=lambda groups: Watched(groups, lr=0.0), max_grad_norm=0.01)
    run = trainer(tmp_path, max_steps=2, val_check_interval=100, **setting)
    run.fit(module, data())
    logged = rows_of(run.logger, "train/grad_norm")
    assert norms == pytest.approx(logged if limit is None else [limit] * 2, rel=1e-3)
    assert min(logged) > 0.1, "logged before clipping"


class Breaks(LRRewarming):
    """Callback that makes weights non-finite before the third step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if trainer.global_step == 2:
            with torch.no_grad():
                pl_module.model.get_input_embeddings().weight.fill_(float("nan"))


class TestNotFinite:
    """The message names the first step and its rows, whenever losses are checked."""

    MESSAGE = r"^loss is nan at optimizer step 2 at prose: prose-00000\d.tar, member"

    @pytest.mark.parametrize(
        ("options", "steps_done"),
        [
            ({"log_every_n_steps": 1, "max_steps": 9}, 2),
            ({"log_every_n_steps": 4, "max_steps": 9}, 3),
            ({"log_every_n_steps": 0, "max_steps": 5}, 5),  # at the end
            ({"log_every_n_steps": 0, "max_steps": 9, "val_check_interval": 8}, 4),
        ],
    )
    def test_the_run_stops_with_step_and_rows(
        self,
        tiny_config: dict[str, Any],
        data: Callable[..., TextDataModule],
        tmp_path: Path,
        options: dict[str, Any],
        steps_done: int,
    ) -> None:
        options = {"val_check_interval": 100, "callbacks": [Breaks(WarmupCosine(1e-3, 1e-4), 9)], **options}
        run = trainer(tmp_path, **options)
        with pytest.raises(FloatingPointError, match=self.MESSAGE):
            run.fit(CausalLM(tiny_config), data())
        assert run.global_step == steps_done

    def test_no_checkpoint_is_saved(
        self, tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
    ) -> None:
        save = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True,
                               save_on_exception=True)  # fmt: skip
        callbacks = [Breaks(WarmupCosine(1e-3, 1e-4), 9), save]
        options: dict[str, Any] = {"log_every_n_steps": 9, "max_steps": 9, "enable_checkpointing": True}
        run = trainer(tmp_path, val_check_interval=100, callbacks=callbacks, **options)
        with pytest.raises(FloatingPointError, match=self.MESSAGE):
            run.fit(CausalLM(tiny_config), data())
        assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["last.ckpt", "step=2.ckpt"]
        for path in (tmp_path / "saved").iterdir():
            assert torch.load(path, weights_only=True)["global_step"] == 2

    def test_a_norm_that_overflows(
        self, tiny_config: dict[str, Any], data: Callable[..., TextDataModule], tmp_path: Path
    ) -> None:
        module = CausalLM(tiny_config)
        weight = module.model.get_output_embeddings().weight  # type: ignore[operator]
        weight.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(FloatingPointError, match=r"^gradient norm is (nan|inf) at optimizer step 0$"):
            trainer(tmp_path, max_steps=5, log_every_n_steps=3, val_check_interval=100).fit(module, data())


class OnHost(Tensor):
    """Tensor that has been copied from the device, so that reading it does not wait."""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_step_waits_for_the_device_between_logging_intervals(
    tiny_config: dict[str, Any],
    data: Callable[..., TextDataModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accumulate: int,
) -> None:
    waits: list[tuple[int, str]] = []
    callbacks = [LRRewarming(WarmupCosine(1e-3, 1e-4), 9), ExactResume(), StepProgressBar(), LearningRateMonitor()]
    callbacks.append(Throughput())
    options: dict[str, Any] = {"max_steps": 9, "log_every_n_steps": 4, "val_check_interval": 100}
    run = trainer(tmp_path, **options, callbacks=callbacks, enable_progress_bar=True)

    def counted(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            # Integers on the host (token ids in NumPy, random states) are not values on the device.
            if run.training and self.is_floating_point() and not isinstance(self, OnHost):
                waits.append((run.global_step, name))
            result = original(self, *args, **kwargs)
            return result.as_subclass(OnHost) if name == "cpu" else result

        return call

    module, loaded = CausalLM(tiny_config), data(micro_batch_size=4 // accumulate)
    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    run.fit(module, loaded)
    # At the fourth and eighth step, until after the optimizer has counted it, and at the end.
    assert {step for step, _ in waits} == {3, 4, 7, 8, 9}


TWO_PROCESSES = """
import json, sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from rewurst.callbacks import LRRewarming, ReplayScheduler, WarmupCosine
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM

settings = json.loads(Path(sys.argv[1]).read_text())
corpora = {"code": Corpus(settings["code"]), "prose": Corpus(settings["prose"], replay=True)}
val = {"prose": settings["prose"], "code": settings["code"]}
data = TextDataModule("code", corpora, val, 8, 2, 8)
torch.manual_seed(0)
module = CausalLM(settings["model"])
trainer = Trainer(
    accelerator="cpu", devices=settings["devices"], strategy="ddp" if settings["devices"] > 1 else "auto",
    max_steps=6, max_epochs=-1, val_check_interval=6 * 4 // settings["devices"], check_val_every_n_epoch=None,
    num_sanity_val_steps=0, log_every_n_steps=1, logger=CSVLogger(settings["folder"]),
    callbacks=[LRRewarming(WarmupCosine(1e-2, 1e-3, 0.1), 6), ReplayScheduler(0.3)],
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, data)
if trainer.is_global_zero:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = {name: value.double().sum().item() for name, value in module.state_dict().items()}
    Path(settings["folder"], "result.json").write_text(json.dumps([metrics, weights]))
"""


def test_two_processes_train_and_validate_as_one(
    tiny_config: dict[str, Any], write_corpus: Callable[..., str], tmp_path: Path
) -> None:
    prose, code = write_corpus("prose", 23), write_corpus("code", 30, seed=1)
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    results = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        settings = {"prose": prose, "code": code, "model": tiny_config, "devices": devices, "folder": str(folder)}
        (folder / "settings.json").write_text(json.dumps(settings))
        if devices == 1:
            run_ranks(tmp_path / "script.py", str(folder / "settings.json"))
        else:  # as a user starts it: a new interpreter, from which Lightning starts the second process
            command = [sys.executable, str(tmp_path / "script.py"), str(folder / "settings.json")]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            environment |= {"MASTER_ADDR": "127.0.0.1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0, done.stderr
        results.append(json.loads((folder / "result.json").read_text()))
    (metrics, weights), (metrics_of_two, weights_of_two) = results
    names = ["train/loss", "tokens", "replay/share_read", "replay/rows/prose", "val/loss/prose", "val/loss/code"]
    assert {name: metrics_of_two[name] for name in names} == pytest.approx({n: metrics[n] for n in names}, rel=1e-5)
    assert metrics["tokens"] == 6 * 8 * 8
    assert metrics["replay/rows/prose"] == int(0.3 * 48)
    assert weights_of_two == pytest.approx(weights, rel=1e-4, abs=1e-4)
