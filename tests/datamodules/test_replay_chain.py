"""Replay over a chain of datasets advances through the old rows, weighted by the rows learned of each corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from save_at import SaveAt
from text_reading import fit

from rewurst import UsageError
from rewurst.datamodules import Corpus, TextDataModule

Make = Callable[..., TextDataModule]


@pytest.fixture
def chain(write_corpus: Callable[..., str]) -> Make:
    """Datasets a, b and c; b replays a, and c replays a, and b if asked."""
    paths = {name: write_corpus(name, 40, seed) for seed, name in enumerate("abc")}

    def build(dataset: str, old: str = "a", **changes: Any) -> TextDataModule:
        replayed = {name: Corpus(paths[name], replay=True) for name in old if name != dataset}
        corpora = {dataset: Corpus(paths[dataset])} | replayed
        sizes = {"sequence_length": 8, "micro_batch_size": 4, "global_batch_size": 8}
        return TextDataModule(**{"dataset": dataset, "corpora": corpora, "val": {}, **sizes, **changes})

    return build


def old_rows(rows: list[tuple[int, int]], corpus: int = 1) -> list[int]:
    return [row for number, row in rows if number == corpus]


@pytest.mark.parametrize("learnt", [True, False], ids=["learnt here", "learnt elsewhere"])
def test_c_replays_the_rows_after_those_that_b_replayed(learnt: bool, chain: Make, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.ckpt" for name in "abc")
    first = old_rows(fit(chain("a", ""), 5, SaveAt(10, a)).rows, 0)
    in_b = old_rows(fit(chain("b"), 10, SaveAt(20, b), ckpt_path=a if learnt else None, share=0.4).rows)
    start = fit(chain("c"), 30, SaveAt(26, c), ckpt_path=b, share=0.4).rows
    rest = fit(chain("c"), 30, ckpt_path=c, share=0.4).rows
    in_c = old_rows(start) + old_rows(rest)
    if learnt:
        assert in_b == first[: len(in_b)]
    assert len(set(in_b)) == len(in_b)
    together = in_b + in_c
    assert len(together) > 40, "it comes around"
    assert sorted(together[:40]) == list(range(40)), "no row twice until all have been replayed"
    if learnt:
        assert together[40:] == together[: len(together) - 40]


def test_a_stopped_run_of_the_chain_replays_as_a_whole_one(chain: Make, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.ckpt" for name in "abc")
    fit(chain("a", ""), 5, SaveAt(10, a))
    fit(chain("b"), 9, SaveAt(18, b), ckpt_path=a)
    whole = fit(chain("c", "ab"), 25, ckpt_path=b, share=0.5).rows
    part = fit(chain("c", "ab"), 25, SaveAt(31, c), ckpt_path=b, share=0.5).rows
    rest = fit(chain("c", "ab"), 25, ckpt_path=c, share=0.5).rows
    assert part[: 6 * 8] + rest == whole  # 31 micro-batches are 15 steps and a half


def test_old_corpora_are_weighted_by_their_learned_rows(chain: Make, tmp_path: Path) -> None:
    a, b = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    fit(chain("a", ""), 4, SaveAt(8, a))  # 32 rows
    fit(chain("b", ""), 6, SaveAt(12, b), ckpt_path=a)  # 16 rows
    rows = fit(chain("c", "ab"), 6 + 24, ckpt_path=b, share=0.5).rows
    counts = {corpus: len(old_rows(rows, corpus)) for corpus in (1, 2)}
    assert counts[1] == pytest.approx(2 * counts[2], abs=2)
    unknown = fit(chain("c", "ab"), 24, share=0.5).rows
    assert len(old_rows(unknown, 1)) == pytest.approx(len(old_rows(unknown, 2)), abs=1)


def test_weights_for_some_of_the_old_corpora_are_refused(chain: Make) -> None:
    data = chain("c", "ab")
    data.corpora["a"].weight = 2.0
    with pytest.raises(UsageError, match="replayed corpus 'b' has no weight and 'a' has one"):
        fit(data, 2, share=0.5)


def test_a_run_of_an_earlier_version_keeps_its_order(chain: Make, tmp_path: Path) -> None:
    """Its checkpoint has neither replay positions nor weights: replay is equal, from the first rows."""
    a, b, c = (tmp_path / f"{name}.ckpt" for name in "abc")
    fit(chain("a", ""), 4, SaveAt(8, a))
    fit(chain("b"), 9, SaveAt(18, b), ckpt_path=a, share=0.5)
    fit(chain("c", "ab"), 11, SaveAt(22, c), ckpt_path=b, share=0.5)
    checkpoint = torch.load(c, weights_only=True)
    state = checkpoint["TextDataModule"]
    for key in ("replayed", "replayed_before", "weigh_by_rows"):
        del state[key]
    state["fingerprint"] = _earlier_fingerprint(chain("c", "ab"))
    torch.save(checkpoint, c)
    rows = fit(chain("c", "ab"), 20, ckpt_path=c, share=0.5).rows
    assert len(old_rows(rows, 1)) == pytest.approx(len(old_rows(rows, 2)), abs=1)
    first = fit(chain("a", ""), 4).rows
    assert old_rows(rows, 1)[:8] == old_rows(first, 0)[4:12], "2 steps replayed 4 rows of a, from the first one on"


def _earlier_fingerprint(data: TextDataModule) -> str:
    data.setup("fit")
    for corpus in data.corpora.values():
        corpus.weight = 1.0
    return data._fingerprint()
