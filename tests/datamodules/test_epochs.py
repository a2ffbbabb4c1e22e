"""Each corpus's epoch is logged, and repeated new data is reported once, in one line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from save_at import SaveAt
from text_reading import _QUIET, Reader, fit

from rewurst.callbacks import ReplayScheduler
from rewurst.datamodules import Corpus, TextDataModule

REPEATED = "is read again from step"


def repetitions(found: list[Any]) -> list[str]:
    return [str(one.message) for one in found if REPEATED in str(one.message)]


def test_a_small_corpus_that_is_repeated_is_reported_once(
    make: Callable[..., TextDataModule], write_corpus: Callable[..., str]
) -> None:
    """9 rows in 20 steps of 16 are read 35.6 times."""
    data = make(corpora={"tiny": Corpus(write_corpus("tiny", 9))}, global_batch_size=16)
    with pytest.warns(UserWarning, match=REPEATED) as found:
        fit(data, 20)
    assert repetitions(list(found)) == [
        "corpus 'tiny' is read again from step 1 of 20 on: the whole run reads its 9 rows 35.6 times. "
        "Prepare more data, or train for fewer steps"
    ]


@pytest.mark.parametrize(("steps", "expected"), [(3, 0), (4, 1)])
def test_the_first_repeated_row_is_what_counts(make: Callable[..., TextDataModule], steps: int, expected: int) -> None:
    """30 rows of code in batches of 8: the fourth batch reads two of them again."""
    data = make(corpora={"code": make().corpora["code"]})
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(data, steps)
    assert len(repetitions(found)) == expected


def test_replayed_data_and_requested_epochs_are_not_reported(make: Callable[..., TextDataModule]) -> None:
    code = make().corpora["code"]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(make(corpora={"prose": make().corpora["prose"], "code": code}), 4, share=0.9)
        fit(make(corpora={"code": code}, global_batch_size=6, micro_batch_size=6), -1, max_epochs=2)
    assert not repetitions(found)


def test_epochs_are_logged_and_survive_a_resume(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    def epochs(name: str, steps: int, *callbacks: Any, **options: Any) -> dict[str, float]:
        logger = CSVLogger(tmp_path / name)
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[ReplayScheduler(0.25), *callbacks], logger=logger,
            log_every_n_steps=1, **_QUIET,
        )  # fmt: skip
        trainer.fit(Reader(), make(), **options)
        header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        last = dict(zip(header.split(","), lines[-1].split(","), strict=True))
        return {key: float(value) for key, value in last.items() if re.match("data/epoch/", key)}

    path = tmp_path / "a.ckpt"
    expected = {"data/epoch/code": pytest.approx(6 * 6 / 30), "data/epoch/prose": pytest.approx(6 * 2 / 21)}
    assert epochs("whole", 6) == expected
    epochs("stopped", 6, SaveAt(8, path))
    assert epochs("resumed", 6, ckpt_path=path) == expected
