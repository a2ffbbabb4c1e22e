"""Two corpora from sources or prepared folders; splits share no document with each other or with validation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from rewurst import UsageError
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.reproduce.continual.corpora import prepare
from rewurst.reproduce.continual.scales import SCALES, Scale
from rewurst.tokenizer_files import load_tokenizer
from rewurst.train import main

DOCUMENTS = 90


@pytest.fixture
def micro(tiny_config: dict[str, Any], tmp_path: Path) -> Scale:
    """Return a scale with a vocabulary of 300 and rows of 8 tokens."""
    config = yaml.safe_load((Path(__file__).parents[3] / "configs/continual/demo.yaml").read_text())
    config["model"]["init_args"]["model"] = tiny_config | {"vocab_size": 300}
    config["data"]["init_args"]["sequence_length"] = 8
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(config))
    return replace(SCALES["tiny"], configs=(str(tmp_path / "micro.yaml"),), held_out=(0.2, 0.2))


def sources(folder: Path) -> list[list[str]]:
    names = []
    for corpus in ("poems", "letters"):
        lines = [json.dumps({"text": f"{corpus} number {i}: " + f"{corpus[i % 4]}{i} " * 12}) for i in range(DOCUMENTS)]
        (folder / f"{corpus}.jsonl").write_text("\n".join(lines))
        names.append([str(folder / f"{corpus}.jsonl")])
    return names


def documents(path: str) -> Iterator[str]:
    """Return the numbers in a corpus's documents."""
    shards = TokenShards(path)
    tokenizer = load_tokenizer(str(Path(path) / "tokenizer"))
    tokens = [token for row in range(len(shards)) for token in shards.read([row])[0][:-1].tolist()]
    text = Tokenizer.from_str(tokenizer.json).decode(tokens, skip_special_tokens=True)
    yield from (part.split(":")[0] for part in text.split("number ")[1:-1])  # the last one may be cut off


def test_sources_become_corpora_and_splits(micro: Scale, tmp_path: Path) -> None:
    old, new = sources(tmp_path)
    data = prepare(old, new, tmp_path / "data", micro)
    assert (data.old_name, data.new_name) == ("poems", "letters")
    parts = [set(documents(split[name]["path"])) for split in data.splits for name in split]
    held_out = set(documents(data.val["letters"]))
    train = set(documents(data.new["letters"]["path"]))
    assert len(parts) == 3
    assert all(len(part) > DOCUMENTS // 9 for part in parts)
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]  # noqa: PT018
    assert not set.union(*parts) & held_out
    assert len(set.union(*parts) ^ train) <= 4, "together they are the training side, but for cut ends"

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert prepare(old, new, tmp_path / "data", micro) == data
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}

    folders = [[str(tmp_path / "data" / name)] for name in ("poems", "letters")]
    assert prepare(*folders, tmp_path / "other", micro) == replace(data, splits=())
    with pytest.raises(UsageError, match="prepare both"):
        prepare(folders[0], new, tmp_path / "other", micro)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds is 0, expected 1 or more"),
        (["--jobs", "-1"], "--jobs is -1, expected 1 or more"),
        (["--old", "a.txt"], "--old and --new go together"),
        (["--scale", "tiniest"], "did you mean 'tiny'"),
        (["--scale", "405m"], "data/pile/train is not a prepared corpus"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "continual", "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
