"""One command continues a model of the hub on a folder of text, in a folder that has nothing else of ours."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rewurst
from rewurst import UsageError
from rewurst.datamodules import Corpus, ImageTextDataModule, TextDataModule
from rewurst.preparation import cached
from rewurst.preparation.cached import cached_corpus
from rewurst.preparation.tokenizer import train_tokenizer
from rewurst.train import main

RECIPE = "configs/continual/your_text.yaml"
WORDS = ["river", "stone", "cloud", "window", "silver", "garden", "house", "tree", "bird", "song"]


def write_texts(folder: Path, count: int, seed: int = 0) -> str:
    folder.mkdir()
    for i in range(count):
        draw = random.Random(f"{seed} {i}")
        (folder / f"{i:02d}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(120)) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def hub_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hub")
    train_tokenizer([write_texts(folder / "texts", 10)], 300, folder / "tokenizer", progress=False)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWURST_CORPORA_DIR", str(tmp_path / "cache"))
    write_texts(tmp_path / "my_texts", 50)
    write_texts(tmp_path / "old_texts", 30, seed=1)
    return tmp_path


def command(model: str, *more: str) -> list[str]:
    source = ["--data.init_args.source", "my_texts", "--data.init_args.replay_source", "old_texts"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    return ["fit", "--config", RECIPE, "--model.init_args.model", model, *source, *quiet, *more]


def test_the_recipe_is_short_and_is_part_of_the_package() -> None:
    path = Path(rewurst.__file__).parent / RECIPE
    assert len(path.read_text().splitlines()) <= 15


def test_one_command_from_a_folder_of_text_to_an_exported_model(
    here: Path, hub_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(hub_model)) == 0
    exported = here / "runs/your_text/model"
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (hub_model, exported))
    moved = [not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(moved)
    words = AutoTokenizer.from_pretrained(exported)
    assert words("river stone")["input_ids"] == AutoTokenizer.from_pretrained(hub_model)("river stone")["input_ids"]
    rows = (here / "runs/your_text/version_0/metrics.csv").read_text()
    header = rows.splitlines()[0].split(",")
    assert {"val/loss/old", "val/loss/your_text", "forgetting/old", "adaptation/your_text"} <= set(header)
    capsys.readouterr()
    assert main(command(hub_model)) == 0  # the same command finds its work done
    assert "complete: " in capsys.readouterr().out
    prepared = {path: path.stat().st_mtime_ns for path in (here / "cache").rglob("*") if path.is_file()}
    second = [
        "--trainer.logger.init_args.name", "second", "--trainer.max_epochs", "2",
        "--peak", "1e-2", "--length", "3", "--share", "0.5",
    ]  # fmt: skip
    assert main(command(hub_model, *second)) == 0
    assert {path: path.stat().st_mtime_ns for path in (here / "cache").rglob("*") if path.is_file()} == prepared
    config = yaml.safe_load((here / "runs/second/version_0/config.yaml").read_text())
    rewarming, replay, *_ = config["trainer"]["callbacks"]
    assert rewarming["init_args"]["length"] == 3
    settings = rewarming["init_args"]["schedule"]["init_args"]
    assert (settings["peak"], settings["minimum"]) == (0.01, pytest.approx(0.001))
    assert replay["init_args"]["share"] == 0.5


def test_low_rank_adapters_end_in_a_plain_model(here: Path, hub_model: str) -> None:
    lora = ["--model.init_args.lora", "{r: 2, lora_alpha: 4, target_modules: [q_proj]}", "--peak", "1e-2"]
    assert main(command(hub_model, *lora)) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (hub_model, here / "runs/your_text/model"))
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    assert {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])} == {"q_proj"}


def test_something_else_in_the_place_of_the_export_is_refused_before_training(
    here: Path, hub_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "runs/your_text/model").mkdir(parents=True)
    (here / "runs/your_text/model/precious").write_text("")
    assert main(command(hub_model)) == 2
    error = capsys.readouterr().err
    assert "ExportAtEnd: runs/your_text/model is not an export of a run; choose another folder" in error
    assert not (here / "runs/your_text/version_0/checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.init_args.source", "my_txts"], "source my_txts: no such file or folder; did you mean my_texts or"),
        (["--share", "2"], "share 2.0 must lie between 0 and 1"),
        (["--length", "soon"], "length 'soon' is not a length"),
    ],
)
def test_mistakes_are_one_line(
    here: Path, hub_model: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(hub_model, *options)) == 2
    assert message in capsys.readouterr().err


def test_a_short_option_without_its_callback_is_refused(
    here: Path, hub_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(hub_model, "--trainer.callbacks", "[]", "--share", "0.1")) == 2
    assert "--share 0.1 is for the callback ReplayScheduler, which this config does not have" in capsys.readouterr().err


@pytest.fixture
def prepare(here: Path, hub_model: str) -> Callable[..., Path]:
    def build(source: str = "my_texts", **changes: Any) -> Path:
        options = {"sequence_length": 16, "held_out": 0.1, "progress": False, "cache": here / "cache", **changes}
        return cached_corpus([source], options.pop("tokenizer", hub_model), **options)

    return build


def test_prepared_text_is_found_by_its_content(
    prepare: Callable[..., Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare()
    monkeypatch.setattr(cached, "prepare_text", None)  # nothing is prepared again
    os.utime("my_texts/00.txt")
    assert prepare() == first
    os.rename("my_texts", "moved")
    assert prepare("moved") == first
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert len({first, prepare("moved", sequence_length=8), prepare("moved", held_out=0.2)}) == 3
    Path("moved/00.txt").write_text("another text " * 20)
    assert prepare("moved") != first


def test_what_was_prepared_before_a_failure_is_used(
    prepare: Callable[..., Path], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rewurst.preparation.engine.text_units.pack", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    [unfinished] = (here / "cache").iterdir()
    assert list((unfinished / ".preparing/tokens").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("rewurst.preparation.engine.text_units.encode", None)  # no text is encoded again
        folder = prepare()
    assert list((here / "cache").iterdir()) == [folder]


def test_a_small_text_holds_out_more_until_there_is_a_document(prepare: Callable[..., Path], here: Path) -> None:
    for i in range(4, 50):
        Path(f"my_texts/{i:02d}.txt").unlink()
    folder = prepare(held_out=0.01)
    documents = [json.loads((folder / side / "index.json").read_text())["documents"] for side in ("train", "val")]
    assert sum(documents) == 4
    assert all(documents)
    assert list((here / "cache").iterdir()) == [folder]


def test_one_document_cannot_be_held_out(prepare: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"none of the 1 documents is here .* --document_separator"):
        prepare("my_texts/00.txt")


def data(**changes: Any) -> TextDataModule:
    arguments: dict[str, Any] = {
        "dataset": "new",
        "corpora": {},
        "val": {},
        "sequence_length": 16,
        "micro_batch_size": 2,
        "global_batch_size": 4,
    }
    return TextDataModule(**{**arguments, **changes})


def test_a_data_module_alone_prepares_its_sources(here: Path, hub_model: str) -> None:
    corpora = {"a": Corpus(source="my_texts"), "b": Corpus(source=["old_texts"], replay=True)}
    module = data(corpora=corpora, tokenizer=hub_model, held_out=0.1)
    module.setup("fit")
    assert set(module.val) == {"a", "b"}
    assert module.vocab_size == 300
    assert [Path(module.corpora[name].path).name for name in ("a", "b")] == ["train", "train"]


def test_what_a_source_needs(here: Path, hub_model: str) -> None:
    with pytest.raises(UsageError, match="source my_texts: the model comes without a tokenizer; set data"):
        data(source="my_texts").setup("fit")
    with pytest.raises(UsageError, match="sequence_length is not set, and the model does not say"):
        data(source="my_texts", tokenizer=hub_model, sequence_length=None).setup("fit")
    with pytest.raises(UsageError, match="corpus 'new' is given twice"):
        data(source="my_texts", corpora={"new": Corpus(source="old_texts")})
    with pytest.raises(
        UsageError, match="a corpus needs a path, a source or a stream; path is '', source is None, stream is None"
    ):
        Corpus()
    with pytest.raises(UsageError, match="a corpus needs a path, a source or a stream"):
        Corpus("a", source="b")
    with pytest.raises(UsageError, match="corpus 'a' has a source, which only TextDataModule prepares"):
        ImageTextDataModule("a", {"a": Corpus(source="x")}, {}, 8, 1, 1)
