"""Prepare or find the two corpora of the experiments and three splits of the new one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import UsageError
from ...preparation.sources.documents import Skipped, expand, read
from ...preparation.text import is_held_out, prepare_text, train_tokenizer
from ..configs import load
from .scales import CONFIGS, Scale, base_config

Corpora = dict[str, dict[str, Any]]
BUILTIN = (["builtin:prose"], ["builtin:code"])
SPLITS = 3


@dataclass(frozen=True)
class Data:
    """Training and validation corpora of the old and the new data.

    Args:
        old: Corpora to learn first, by name as in configs.
        new: Corpora to learn next, by name as in configs.
        val: Folders of the old and the new validation corpus, by name.
        splits: Disjoint parts of the new data; empty if there are none.
    """

    old: Corpora
    new: Corpora
    val: dict[str, str]
    splits: tuple[Corpora, ...] = ()

    @property
    def old_name(self) -> str:
        """Name of the old validation corpus."""
        return next(iter(self.val))

    @property
    def new_name(self) -> str:
        """Name of the new validation corpus."""
        return list(self.val)[1]


def of_recipe(scale: Scale) -> Data:
    """Return the data of a scale's recipes, in which replayed corpora are the old ones."""
    assert scale.data is not None
    arguments = load(CONFIGS / scale.data)["init_args"]
    corpora, val = arguments["corpora"], arguments["val"]
    old = {name: _without_replay(corpus) for name, corpus in corpora.items() if corpus.get("replay")}
    new = {name: corpus for name, corpus in corpora.items() if not corpus.get("replay")}
    old_val = [name for name in val if name in old]
    new_val = [name for name in val if name not in old]
    splits = tuple(load(CONFIGS / name)["init_args"]["corpora"] for name in scale.splits)
    return Data(old, new, {name: val[name] for name in (*old_val, *new_val)}, splits)


def prepare(old: Sequence[str], new: Sequence[str], out: Path, scale: Scale, tokenizer: str | None = None) -> Data:
    """Prepare two corpora under a folder; existing shards are kept.

    Args:
        old: Sources, or one folder written by ``rewurst prepare text`` with a held-out part.
        new: Sources or folder of the new corpus.
        out: Folder for tokenizer and shards.
        scale: Scale that sets the length of rows, the vocabulary and the held-out shares.
        tokenizer: Folder or hub name; by default a tokenizer is trained on both corpora.
    """
    config = base_config(scale)
    ready = [_is_prepared(sources) for sources in (old, new)]
    if not all(ready) and any(ready):
        raise UsageError(f"{(old, new)[ready.index(True)][0]} is prepared but the other corpus is not: prepare both")
    names = _names(old, new)
    if all(ready):
        folders = [Path(sources[0]) for sources in (old, new)]
        return _data(names, folders, ())
    if tokenizer is None:
        tokenizer = str(out / "tokenizer")
        if not (out / "tokenizer" / "tokenizer.json").exists():
            size = config["model"]["init_args"]["model"]["vocab_size"]
            train_tokenizer([*old, *new], size, out / "tokenizer", overwrite=True)
    length = config["data"]["init_args"]["sequence_length"]
    folders = [out / name for name in names]
    for folder, sources, share in zip(folders, (old, new), scale.held_out, strict=True):
        if not all((folder / side / "index.json").exists() for side in ("train", "val")):
            prepare_text(sources, tokenizer, folder, sequence_length=length, held_out=share, overwrite=True)
    splits = [out / f"split_{number}" for number in range(1, SPLITS + 1)]
    if not all((folder / "train" / "index.json").exists() for folder in splits):
        texts = [folder.with_suffix(".jsonl") for folder in splits]
        _write_splits(texts, new, scale.held_out[1])
        for folder, text in zip(splits, texts, strict=True):
            prepare_text([str(text)], tokenizer, folder, sequence_length=length, overwrite=True)
            text.unlink()
    return _data(names, folders, splits)


def _data(names: Sequence[str], folders: Sequence[Path], splits: Sequence[Path]) -> Data:
    old, new = ({name: {"path": str(folder / "train")}} for name, folder in zip(names, folders, strict=True))
    val = {name: str(folder / "val") for name, folder in zip(names, folders, strict=True)}
    return Data(old, new, val, tuple({folder.name: {"path": str(folder / "train")}} for folder in splits))


def _names(old: Sequence[str], new: Sequence[str]) -> list[str]:
    names = [Path(sources[0].split(":")[-1]).name.split(".")[0] for sources in (old, new)]
    plain = [name.isidentifier() and not name.startswith("split_") for name in names]
    return names if all(plain) and names[0] != names[1] else ["old", "new"]


def _is_prepared(sources: Sequence[str]) -> bool:
    folder = Path(sources[0])
    if not (folder / "train" / "index.json").exists():
        return False
    if len(sources) > 1 or not (folder / "val" / "index.json").exists():
        raise UsageError(f"{folder} is a prepared corpus: give only this folder, prepared with --held_out")
    return True


def _without_replay(corpus: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in corpus.items() if key != "replay"}


def _write_splits(paths: Sequence[Path], sources: Sequence[str], held_out: float) -> None:
    """Write every document that is not held out for validation as a JSON line into one of the files."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("w", encoding="utf8")) for path in paths]
        for pieces in _documents(sources):
            text = "".join(pieces)
            if not is_held_out(pieces[0], held_out):
                files[_split_of(text)].write(json.dumps({"text": text}) + "\n")


def _split_of(text: str) -> int:
    """Return a document's split (0 to 2) by its content, independent of whether it is held out."""
    return hashlib.sha256(text.encode("utf8")).digest()[0] % SPLITS


def _documents(sources: Sequence[str]) -> Iterator[list[str]]:
    """Yield documents in pieces. Skipped ones were reported when the corpus was prepared."""
    skipped = Skipped()
    for file in expand(list(sources), skipped):
        pieces: list[str] = []
        for piece in read(file, "text", skipped):
            pieces.append(piece.text)
            if piece.ends_document:
                yield pieces
                pieces = []
