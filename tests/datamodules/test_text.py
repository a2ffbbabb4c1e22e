"""Global batches of TextDataModule under a real Trainer: the same however they are cut, stopped and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from ranks import run_ranks
from torch import Tensor, nn

from rewurst import UsageError
from rewurst.callbacks import ReplayScheduler
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.datamodules.sampling.micro_batches import EvaluationRows
from rewurst.datamodules.text import TokenReader

Batch = dict[str, Tensor]


_QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}


class Reader(LightningModule):
    """Writes down the rows of every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.rows: list[tuple[int, int]] = []
        self.tokens: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.rows += list(zip(batch["corpus"].tolist(), batch["row"].tolist(), strict=True))
        self.tokens.append(batch["input_ids"])
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves after a number of micro-batches and stops."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.fixture
def make(write_corpus: Callable[..., str]) -> Callable[..., TextDataModule]:
    prose, code, val = write_corpus("prose", 21), write_corpus("code", 30, seed=1), write_corpus("val", 10, seed=2)

    def build(**changes: Any) -> TextDataModule:
        corpora = {"prose": Corpus(prose, replay=True), "code": Corpus(code)}
        arguments: dict[str, Any] = {
            "dataset": "code",
            "corpora": corpora,
            "val": {"val": val},
            "sequence_length": 8,
            "micro_batch_size": 4,
            "global_batch_size": 8,
        }
        return TextDataModule(**{**arguments, **changes})

    return build


def fit(
    data: TextDataModule,
    steps: int,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    share: float = 0.3,
    **options: Any,
) -> Reader:
    module = Reader()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=options.pop("max_epochs", -1),
        callbacks=[*([ReplayScheduler(share)] if data.replay_corpora else []), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return module


def test_global_batches_do_not_depend_on_micro_batches_or_workers(make: Callable[..., TextDataModule]) -> None:
    expected = fit(make(), 12)
    for changes in ({"micro_batch_size": 1}, {"micro_batch_size": 8}, {"num_workers": 2}):
        other = fit(make(**changes), 12)
        assert other.rows == expected.rows
        assert torch.equal(torch.cat(other.tokens), torch.cat(expected.tokens))


def test_rows_are_those_of_the_shards(make: Callable[..., TextDataModule]) -> None:
    data = make()
    module = fit(data, 6)
    shards = [TokenShards(data.corpora[name].path) for name in ("code", "prose")]  # new corpora are numbered first
    tokens = torch.cat(module.tokens).numpy()
    for (corpus, row), read in zip(module.rows, tokens, strict=True):
        assert (shards[corpus].read(np.array([row]))[0] == read).all()


@pytest.mark.parametrize(
    ("seed", "shuffle", "steps"), [(0, "full", 5), (7, "full", 2), (7, "window", 2), (3, "full", 1)]
)
def test_replay_repeats_the_first_reading(
    make: Callable[..., TextDataModule], tmp_path: Path, seed: int, shuffle: str, steps: int
) -> None:
    """In its order and as far as it went, whatever seed and shuffle the new dataset has."""
    path = tmp_path / "a.ckpt"
    prose = {"prose": Corpus(make().corpora["prose"].path)}
    first = fit(make(dataset="prose", corpora=prose, seed=seed, shuffle=shuffle), steps, SaveAt(2 * steps, path))
    read = [row for _, row in first.rows]
    replayed = [row for corpus, row in fit(make(), steps + 9, ckpt_path=path).rows if corpus == 1]
    assert len(replayed) == int(0.3 * 72)
    assert replayed == [read[counter % len(read)] for counter in range(len(replayed))]


def test_the_ledger_goes_through_several_datasets(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    one, two = tmp_path / "one.ckpt", tmp_path / "two.ckpt"
    prose, code = (make().corpora[name].path for name in ("prose", "code"))
    first = fit(make(dataset="prose", corpora={"prose": Corpus(prose)}, seed=5), 2, SaveAt(4, one)).rows
    second = fit(make(seed=6), 4, SaveAt(8, two), ckpt_path=one).rows
    corpora = {"val": Corpus(make().val["val"]), "prose": Corpus(prose, replay=True), "code": Corpus(code, replay=True)}
    third = fit(make(dataset="third", corpora=corpora, seed=9), 12, ckpt_path=two, share=0.5).rows
    new_code = [row for corpus, row in second if corpus == 0]
    replayed = {corpus: [row for number, row in third if number == corpus] for corpus in (1, 2)}
    assert replayed[1] == [first[counter % 16][1] for counter in range(len(replayed[1]))]
    assert replayed[2] == [new_code[counter % len(new_code)] for counter in range(len(replayed[2]))]
    assert len(replayed[1]) == len(replayed[2]) == 16
    state = torch.load(two, weights_only=True)["TextDataModule"]
    assert {name: sum(entry["rows"]) for name, entry in state["ledger"].items()} == {"prose": 16, "code": len(new_code)}
    assert len(json.dumps({key: value for key, value in state.items() if key != "tokenizer"})) < 1024


def test_a_corpus_that_changed_since_it_was_learnt_is_not_replayed(
    make: Callable[..., TextDataModule], write_corpus: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    prose = {"prose": Corpus(make().corpora["prose"].path)}
    fit(make(dataset="prose", corpora=prose), 2, SaveAt(4, path))
    changed = {"prose": Corpus(write_corpus("changed", 21, seed=8), replay=True), "code": make().corpora["code"]}
    with pytest.raises(UsageError, match="corpus 'prose' is not the one that was learnt: its shards have changed"):
        fit(make(corpora=changed), 4, ckpt_path=path)


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


def test_without_max_steps_an_epoch_is_a_pass_over_the_new_corpora(make: Callable[..., TextDataModule]) -> None:
    code = {"code": Corpus(make().corpora["code"].path)}
    module = fit(make(corpora=code, global_batch_size=6, micro_batch_size=6), -1, max_epochs=2)
    rows = [row for _, row in module.rows]
    assert sorted(rows[:30]) == sorted(rows[30:]) == list(range(30))
    assert rows[:30] != rows[30:]


def test_replay_share_read_is_the_share_asked_for(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    data, logger = make(), CSVLogger(tmp_path)
    trainer = Trainer(
        accelerator="cpu", max_steps=20, callbacks=[ReplayScheduler(0.3)], logger=logger,
        log_every_n_steps=20, **_QUIET,
    )  # fmt: skip
    trainer.fit(Reader(), data)
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    logged = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert float(logged["replay/share_asked"]) == pytest.approx(0.3)
    assert abs(float(logged["replay/share_read"]) - 0.3) * 160 < 1
    assert float(logged["replay/rows/prose"]) + float(logged["replay/rows/code"]) == 160


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_validation_reads_every_row_once_and_every_rank_as_many_batches(
    write_corpus: Callable[..., str], world_size: int, rows: int
) -> None:
    shards = TokenShards(write_corpus("val", 23))
    ranks = [EvaluationRows(shards, TokenReader([shards]), rows, rank, world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    batches = [rank[number] for rank in ranks for number in range(len(rank))]
    read = torch.cat([batch["row"][batch["valid"]] for batch in batches])
    assert sorted(read.tolist()) == list(range(23))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 9}, "global_batch_size 9 is no multiple of micro_batch_size 4 times 1 devices"),
        ({"micro_batch_size": 0}, "micro_batch_size 0 must be at least 1"),
        ({"sequence_length": 16}, "has rows of sequence_length 8, asked for is 16"),
        ({"corpora": {"prose": Corpus("x", replay=True)}}, "has no corpus without replay: true"),
        ({"corpora": {"code": Corpus("corpora/cod")}}, "no corpus at corpora/cod"),
    ],
)
def test_bad_settings(make: Callable[..., TextDataModule], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        fit(make(**changes), 2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_refused_combinations(
    make: Callable[..., TextDataModule], write_corpus: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    fit(make(), 4, SaveAt(4, path))
    with pytest.raises(UsageError, match="dataset 'code': its corpora, weights, seed, shuffle or batch size differ"):
        fit(make(seed=1), 4, ckpt_path=path)
    with pytest.raises(UsageError, match=r"was begun with replay share 0.3, now it is 0.5"):
        fit(make(), 4, share=0.5, ckpt_path=path)
    with pytest.raises(UsageError, match="accumulate_grad_batches 3 contradicts global_batch_size 8"):
        fit(make(), 4, accumulate_grad_batches=3)
    with pytest.raises(UsageError, match="corpus 'prose' is to be replayed and nothing says how much"):
        Trainer(accelerator="cpu", max_steps=2, logger=False, **_QUIET).fit(Reader(), make())
    other = TextDataModule("a", {"a": Corpus(make().corpora["code"].path)}, {}, 8, 4, 4)
    with pytest.raises(UsageError, match="dataset 'a' has no corpus to replay"):
        fit(other, 2, ReplayScheduler(0.1))


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


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_validation_needs_neither_the_training_corpora_nor_their_position(
    make: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    fit(make(), 4, SaveAt(4, path))
    elsewhere = make(corpora={"code": Corpus("corpora/not/on/this/machine")}, seed=3)
    trainer = Trainer(accelerator="cpu", logger=False, **{**_QUIET, "max_epochs": None})
    trainer.validate(Reader(), elsewhere, ckpt_path=path, weights_only=True, verbose=False)
    assert trainer.state.finished


def test_lengths_in_tokens_are_those_of_the_data(make: Callable[..., TextDataModule]) -> None:
    from rewurst.callbacks import LRRewarming, WarmupCosine

    rewarming = LRRewarming(WarmupCosine(0.1, 0.01), length="650 tokens")
    fit(make(), 3, rewarming)
    assert rewarming.run.length == 11  # 64 tokens a step


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
    """1 -> 2 -> 1 processes, other micro-batches and workers, stopped within a global batch too."""
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


def test_the_same_objects_in_a_fresh_trainer_begin_anew(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
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


def test_two_data_modules_in_one_trainer(make: Callable[..., TextDataModule]) -> None:
    trainer = Trainer(accelerator="cpu", max_steps=3, logger=False, callbacks=[ReplayScheduler(0.3)], **_QUIET)
    trainer.fit(Reader(), make())
    code = make(dataset="b", corpora={"code": make().corpora["code"]}, micro_batch_size=2)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ReplayScheduler)]
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit_loop._combined_loader = None
    trainer.fit(Reader(), code)
    assert trainer.accumulate_grad_batches == 4


def test_corpora_in_another_order_are_another_mixture(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    a, b = (Corpus(make().corpora[name].path) for name in ("prose", "code"))
    fit(make(corpora={"a": a, "b": b}), 3, SaveAt(2, path))
    with pytest.raises(UsageError, match="its corpora, weights, seed, shuffle or batch size differ"):
        fit(make(corpora={"b": b, "a": a}), 3, ckpt_path=path)
