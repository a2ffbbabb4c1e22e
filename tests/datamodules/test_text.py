"""Global batches of TextDataModule with a real Trainer are the same however they are split, stopped and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from save_at import SaveAt
from text_reading import _QUIET, Reader, fit

from rewurst import UsageError
from rewurst.callbacks import ReplayScheduler
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.datamodules.sampling.micro_batches import EvaluationRows
from rewurst.datamodules.text import TokenReader


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
    """In the same order and as far as it went, for any seed and shuffle of the new dataset."""
    path = tmp_path / "a.ckpt"
    prose = {"prose": Corpus(make().corpora["prose"].path)}
    first = fit(make(dataset="prose", corpora=prose, seed=seed, shuffle=shuffle), steps, SaveAt(2 * steps, path))
    read = [row for _, row in first.rows]
    replayed = [row for corpus, row in fit(make(), steps + 9, ckpt_path=path).rows if corpus == 1]
    assert len(replayed) == int(0.3 * 72)
    assert replayed == [read[counter % len(read)] for counter in range(len(replayed))]


def test_the_ledger_covers_several_datasets(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    one, two = tmp_path / "one.ckpt", tmp_path / "two.ckpt"
    prose, code = (make().corpora[name].path for name in ("prose", "code"))
    first = fit(make(dataset="prose", corpora={"prose": Corpus(prose)}, seed=5), 2, SaveAt(4, one)).rows
    second = fit(make(seed=6), 4, SaveAt(8, two), ckpt_path=one).rows
    corpora = {"val": Corpus(make().val["val"]), "prose": Corpus(prose, replay=True), "code": Corpus(code, replay=True)}
    third = fit(make(dataset="third", corpora=corpora, seed=9), 12, ckpt_path=two, share=0.5).rows
    new_code = [row for corpus, row in second if corpus == 0]
    replayed = {corpus: [row for number, row in third if number == corpus] for corpus in (1, 2)}
    before = 16 - len(new_code)  # rows of prose that the second dataset replayed
    assert replayed[1] == [first[(before + counter) % 16][1] for counter in range(len(replayed[1]))]
    assert replayed[2] == [new_code[counter % len(new_code)] for counter in range(len(replayed[2]))]
    assert len(replayed[1]) / len(replayed[2]) == pytest.approx(16 / len(new_code), rel=0.1)
    state = torch.load(two, weights_only=True)["TextDataModule"]
    assert {name: sum(entry["rows"]) for name, entry in state["ledger"].items()} == {"prose": 16, "code": len(new_code)}
    assert len(json.dumps({key: value for key, value in state.items() if key != "tokenizer"})) < 1024


def test_a_corpus_that_changed_since_it_was_learned_is_not_replayed(
    make: Callable[..., TextDataModule], write_corpus: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    prose = {"prose": Corpus(make().corpora["prose"].path)}
    fit(make(dataset="prose", corpora=prose), 2, SaveAt(4, path))
    changed = {"prose": Corpus(write_corpus("changed", 21, seed=8), replay=True), "code": make().corpora["code"]}
    with pytest.raises(UsageError, match="corpus 'prose' is not the one that was learned: its shards have changed"):
        fit(make(corpora=changed), 4, ckpt_path=path)


def test_without_max_steps_an_epoch_is_a_pass_over_the_new_corpora(make: Callable[..., TextDataModule]) -> None:
    code = {"code": Corpus(make().corpora["code"].path)}
    module = fit(make(corpora=code, global_batch_size=6, micro_batch_size=6), -1, max_epochs=2)
    rows = [row for _, row in module.rows]
    assert sorted(rows[:30]) == sorted(rows[30:]) == list(range(30))
    assert rows[:30] != rows[30:]


def test_replay_share_read_is_the_requested_share(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
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
        ({"global_batch_size": 9}, "global_batch_size 9 is not a multiple of micro_batch_size 4 times 1 devices"),
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
    assert rewarming.run.length == 11  # 64 tokens per step


def test_two_data_modules_in_one_trainer(make: Callable[..., TextDataModule]) -> None:
    trainer = Trainer(accelerator="cpu", max_steps=3, logger=False, callbacks=[ReplayScheduler(0.3)], **_QUIET)
    trainer.fit(Reader(), make())
    code = make(dataset="b", corpora={"code": make().corpora["code"]}, micro_batch_size=2)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ReplayScheduler)]
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit_loop._combined_loader = None
    trainer.fit(Reader(), code)
    assert trainer.accumulate_grad_batches == 4
