"""Runs with TextDataModule stop and resume, also with another number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from ranks import run_ranks
from save_at import SaveAt
from text_reading import _QUIET, Reader, fit

from rewurst import UsageError
from rewurst.callbacks import ReplayScheduler
from rewurst.datamodules import Corpus, TextDataModule


@pytest.mark.parametrize("stop", [2, 5, 8, 11, 23])
@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_a_resumed_run_reads_what_the_whole_one_reads(
    make: Callable[..., TextDataModule], tmp_path: Path, stop: int, micro_batch_size: int
) -> None:
    path = tmp_path / "a.ckpt"
    whole = fit(make(), 12)
    begun = fit(make(), 12, SaveAt(stop, path))
    resumed = fit(make(micro_batch_size=micro_batch_size), 12, ckpt_path=path)
    done = stop // 2 * 8  # rows of complete global batches; one that was not complete is read again
    assert begun.rows[:done] + resumed.rows == whole.rows


def test_a_second_resume_and_a_longer_run(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    one, two = tmp_path / "one.ckpt", tmp_path / "two.ckpt"
    whole = fit(make(), 16)
    rows = fit(make(), 4, SaveAt(8, one)).rows
    rows += fit(make(), 16, SaveAt(14, two), ckpt_path=one).rows
    rows += fit(make(), 16, ckpt_path=two).rows
    assert rows == whole.rows


def test_another_dataset_begins_at_its_own_first_row(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    data = make()
    fit(make(dataset="prose", corpora={"prose": Corpus(data.corpora["prose"].path)}), 5, SaveAt(10, path))
    assert fit(data, 9, ckpt_path=path).rows == fit(make(), 4).rows
    assert (data.progress.start, data.dataset_step, sum(data.rows_read().values())) == (5, 4, 32)


def test_a_checkpoint_of_another_data_module_counts_as_another_dataset(
    make: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    trainer = Trainer(accelerator="cpu", max_steps=3, logger=False, callbacks=[SaveAt(3, path)], **_QUIET)
    module, batch = Reader(), {"corpus": torch.zeros(1), "row": torch.zeros(1), "input_ids": torch.zeros(1)}
    val_loader = torch.utils.data.DataLoader([batch], batch_size=None)
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 4, batch_size=None), val_loader)
    assert fit(make(), 7, ckpt_path=path).rows == fit(make(), 4).rows


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReplayScheduler(5.0), "share 5.0 must lie between 0 and 1: 0.05 replays 5 %"),
        (lambda: ReplayScheduler(_schedule()), "is a schedule: it needs a length"),
        (
            lambda: Trainer(accelerator="cpu", logger=False, callbacks=[ReplayScheduler(0.1)], **_QUIET).fit(
                Reader(), torch.utils.data.DataLoader([0]), torch.utils.data.DataLoader([0])
            ),
            "NoneType cannot replay: ReplayScheduler needs a data module with dataset, dataset_step",
        ),
    ],
)
def test_bad_replay(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        build()
    assert message in str(error.value)


def _schedule() -> Any:
    from rewurst.callbacks import WarmupLinear

    return WarmupLinear(0.5, 0.0)


def test_a_share_that_changes_resumes_where_it_was(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"

    def run(*callbacks: Callback, **options: Any) -> Reader:
        corpora = make().corpora
        module = Reader()
        share = ReplayScheduler(_schedule(), length=12)
        trainer = Trainer(accelerator="cpu", max_steps=12, callbacks=[share, *callbacks], logger=False, **_QUIET)
        trainer.fit(module, make(corpora=corpora), weights_only=True, **options)
        return module

    whole = run()
    begun = run(SaveAt(10, path))
    assert begun.rows + run(ckpt_path=path).rows == whole.rows


WORLD = """
import json, sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rewurst.callbacks import ExactResume, ReplayScheduler
from rewurst.datamodules import Corpus, TextDataModule

settings = json.loads(Path(sys.argv[1]).read_text())


class Reader(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.read = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        rows = list(zip(batch["corpus"].tolist(), batch["row"].tolist()))
        self.read.append([self.trainer.datamodule.progress.step, rows])
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.total_batch_idx + 1 == settings["stop"]:
            trainer.save_checkpoint(settings["save"])
            trainer.should_stop = True


corpora = {"code": Corpus(settings["code"]), "prose": Corpus(settings["prose"], replay=True)}
data = TextDataModule("code", corpora, {}, 8, settings["micro"], 8, num_workers=settings["workers"])
module = Reader()
trainer = Trainer(
    accelerator="cpu", devices=settings["devices"], strategy="ddp" if settings["devices"] > 1 else "auto", max_steps=12,
    max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[ReplayScheduler(0.3), ExactResume(world_size_may_change=True), Save()],
)
trainer.fit(module, data, ckpt_path=settings["load"], weights_only=True)
total = trainer.strategy.reduce(torch.tensor(list(data.rows_read().values()), dtype=torch.float64), reduce_op="sum")
Path(f"{settings['out']}-{trainer.global_rank}.json").write_text(json.dumps([module.read, total.tolist()]))
"""


def test_global_batches_survive_other_numbers_of_processes(write_corpus: Callable[..., str], tmp_path: Path) -> None:
    """1 -> 2 -> 1 processes, other micro-batches and workers, also stopped within a global batch."""
    folders = {name: write_corpus(name, 21 + 9 * seed, seed) for seed, name in enumerate(("prose", "code"))}
    (tmp_path / "world.py").write_text(WORLD)

    def run(name: str, devices: int, micro: int, stop: int | None, load: str | None, workers: int = 0) -> Any:
        settings = {**folders, "devices": devices, "micro": micro, "stop": stop, "workers": workers, "load": load}
        settings |= {"out": str(tmp_path / name), "save": str(tmp_path / f"{name}.ckpt")}
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
        run_ranks(tmp_path / "world.py", str(tmp_path / f"{name}.json"), processes=devices)
        batches: dict[int, list[list[int]]] = {}
        for rank in range(devices):
            read, total = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            for step, rows in read:
                batches.setdefault(step, []).extend(rows)
        return {step: sorted(rows) for step, rows in batches.items()}, total

    whole, total = run("whole", 1, 8, None, None)
    one, _ = run("one", 1, 2, 4 * 4 + 3, None)  # stops after 4 global batches and 3 of 4 micro-batches
    two, _ = run("two", 2, 2, 2 * 8, str(tmp_path / "one.ckpt"), workers=1)
    three, total_of_three = run("three", 1, 4, None, str(tmp_path / "two.ckpt"))
    del one[4]  # not complete, so it was read again
    assert {step: len(rows) for step, rows in whole.items()} == dict.fromkeys(range(12), 8)
    assert {**one, **two, **three} == whole
    assert [*one, *two, *three] == list(range(12)), "nothing is read twice or left out"
    assert total_of_three == total == [96 - int(0.3 * 96), int(0.3 * 96)]


def test_the_same_objects_in_a_fresh_trainer_start_over(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    from rewurst.callbacks import LRRewarming, WarmupCosine

    data, rewarming = make(), LRRewarming(WarmupCosine(0.1, 0.01), length=20)
    first = fit(data, 5, rewarming)
    second = fit(data, 5, rewarming)
    assert first.rows == second.rows
    assert (rewarming.run.start, rewarming.step, data.progress.step) == (0, 5, 5)
    path = tmp_path / "a.ckpt"
    fit(make(), 5, SaveAt(6, path))
    assert fit(data, 5, ckpt_path=path).rows == first.rows[24:], "and a checkpoint loads into them"


@pytest.mark.parametrize(
    ("stop", "micro_batch_size"), [(1, 3), (5, 3), (10, 3), (15, 3), (10, 2), (9, 2), (4, 6), (20, 2)]
)
def test_epochs_resume_where_they_were(
    make: Callable[..., TextDataModule], tmp_path: Path, stop: int, micro_batch_size: int
) -> None:
    """Three epochs of 5 steps of 6 rows, without max_steps."""
    path = tmp_path / "a.ckpt"
    settings: dict[str, Any] = {"corpora": {"code": Corpus(make().corpora["code"].path)}, "global_batch_size": 6}
    whole = fit(make(**settings, micro_batch_size=3), -1, max_epochs=3).rows
    begun = fit(make(**settings, micro_batch_size=3), -1, SaveAt(stop, path), max_epochs=3).rows
    resumed = fit(make(**settings, micro_batch_size=micro_batch_size), -1, max_epochs=3, ckpt_path=path).rows
    assert len(whole) == 90
    assert begun[: stop // 2 * 6] + resumed == whole


def test_stopped_within_the_very_first_batch(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fit(make(micro_batch_size=2), 6, SaveAt(3, path))
    assert fit(make(), 6, ckpt_path=path).rows == fit(make(), 6).rows


def test_corpora_in_another_order_are_another_mixture(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    a, b = (Corpus(make().corpora[name].path) for name in ("prose", "code"))
    fit(make(corpora={"a": a, "b": b}), 3, SaveAt(2, path))
    with pytest.raises(UsageError, match="its corpora, weights, seed, shuffle or batch size differ"):
        fit(make(corpora={"b": b, "a": a}), 3, ckpt_path=path)
