"""What a corpus folder says about itself: ``index.json``, written last, so that a folder without it is unfinished."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

from .. import UsageError
from ..hints import did_you_mean

INDEX_FILE = "index.json"
VERSION = 1
DTYPES = ("uint16", "uint32")
HOW_TO_MAKE = "`rewurst prepare text SOURCE... --tokenizer DIR --out DIR` makes one"


@dataclass(frozen=True)
class Shard:
    """One tar: file name, size in bytes, members, rows in all of them, SHA-256 of the file."""

    name: str
    bytes: int
    samples: int
    rows: int
    sha256: str

    @property
    def idx_name(self) -> str:
        """Name of the sidecar: ``code-000001.idx`` beside ``code-000001.tar``."""
        return Path(self.name).with_suffix(".idx").name


@dataclass(frozen=True)
class CorpusIndex:
    """The contents of ``index.json``.

    Attributes:
        shards: The tars, in the order of the stream.
        dtype: ``uint16`` for vocabularies of up to 65,536 tokens, else ``uint32``.
        sequence_length: Predicted tokens a row; a row holds one token more.
        rows_per_sample: Rows of every tar member but the last one of the corpus, which may hold fewer.
        rows: Rows in all.
        tokens: Predicted tokens, ``rows * sequence_length``.
        documents: Documents in the stream, the dropped tail included.
        dropped_tokens: Tokens at the end of the stream that fill no row.
        vocab_size: Every token is below it.
        end_token: The token after each document.
        tokenizer_sha256: SHA-256 of the ``tokenizer.json`` that made the tokens.
        sources: What was prepared, as it was asked for.
    """

    shards: tuple[Shard, ...]
    dtype: str
    sequence_length: int
    rows_per_sample: int
    rows: int
    tokens: int
    documents: int
    dropped_tokens: int
    vocab_size: int
    end_token: int
    tokenizer_sha256: str
    sources: tuple[str, ...]
    version: int = VERSION
    kind: str = "text"

    @classmethod
    def load(cls, folder: str | Path) -> CorpusIndex:
        """Read and check the ``index.json`` of ``folder``.

        Raises:
            UsageError: No such folder, an unfinished one, one of another kind or of a newer version, or a file that
                contradicts itself.
        """
        path = Path(folder) / INDEX_FILE
        try:
            content = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(_why_absent(Path(folder))) from None
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise UsageError(f"{path}: not valid JSON ({error}); prepare the corpus again") from None
        index = cls._from_json(path, content)
        index._check(path)
        return index

    @classmethod
    def _from_json(cls, path: Path, content: Any) -> CorpusIndex:
        if not isinstance(content, dict):
            raise UsageError(f"{path}: holds a {type(content).__name__}, expected an object")
        if content.get("kind") != "text":
            raise UsageError(f"{path}: kind is {content.get('kind')!r}, expected 'text'")
        version = content.get("version")
        if not _is_count(version) or not 1 <= version <= VERSION:
            raise UsageError(f"{path}: version is {version!r}, this rewurst reads versions up to {VERSION}")
        values = _fields_of(path, cls, content)
        values["sources"] = tuple(values["sources"])
        values["shards"] = tuple(
            Shard(**_fields_of(f"{path}, shards[{i}]", Shard, shard)) for i, shard in enumerate(values["shards"])
        )
        return cls(**values)

    def _check(self, path: Path) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"{path}: dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        rows, samples = sum(s.rows for s in self.shards), sum(s.samples for s in self.shards)
        expected = {
            "sequence_length": max(1, self.sequence_length),
            "rows_per_sample": max(1, self.rows_per_sample),
            "rows": rows,
            "samples of all shards": -(-rows // max(1, self.rows_per_sample)),
            "tokens": rows * self.sequence_length,
        }
        for name, right in expected.items():
            value = samples if name.startswith("samples") else getattr(self, name)
            if value != right:
                raise UsageError(f"{path}: {name} is {value}, expected {right}; prepare the corpus again")
        for shard in self.shards[:-1]:
            if shard.rows != shard.samples * self.rows_per_sample:
                full = shard.samples * self.rows_per_sample
                raise UsageError(
                    f"{path}: {shard.name} has {shard.rows} rows, expected {full}; prepare the corpus again"
                )
        for shard in self.shards:
            if not re.fullmatch(r"[^/\\\0]+\.tar", shard.name):
                raise UsageError(f"{path}: shard name is {shard.name!r}, expected a plain file name that ends in .tar")

    def save(self, folder: str | Path) -> None:
        """Write ``index.json`` atomically: whoever sees it sees all of it."""
        path = Path(folder) / INDEX_FILE
        with writing(path):
            write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which tokens come in which rows; names and sources do not count."""
        content = {
            "shards": [(shard.rows, shard.sha256) for shard in self.shards],
            **{name: getattr(self, name) for name in ("kind", "dtype", "sequence_length", "rows_per_sample", "rows")},
            **{name: getattr(self, name) for name in ("vocab_size", "end_token", "tokenizer_sha256")},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says while ``path`` is written (disk full, no permission) into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8, durably: temporary file in the same folder, fsync, rename."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private; a corpus is shared
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _why_absent(folder: Path) -> str:
    if not folder.exists():
        return f"no corpus at {folder}{did_you_mean(folder) or ':'} {HOW_TO_MAKE}"
    if not folder.is_dir():
        return f"{folder} is a file, expected the folder of a prepared corpus: {HOW_TO_MAKE}"
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{INDEX_FILE}"))
    if inside:
        return f"{folder} has no {INDEX_FILE}; did you mean {' or '.join(inside)}?"
    return f"{folder} has no {INDEX_FILE}: its preparation did not finish, or it is no corpus; {HOW_TO_MAKE}"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fields_of(where: str | Path, cls: type, content: Any) -> dict[str, Any]:
    """The entries of ``content`` that ``cls`` has, each checked against the type that its annotation names."""
    if not isinstance(content, dict):
        raise UsageError(f"{where}: holds a {type(content).__name__}, expected an object")
    values = {}
    for field in fields(cls):
        kind = str(field.type)
        value = content.get(field.name)
        if kind == "int" and not _is_count(value):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected a whole number from 0")
        if kind == "str" and not isinstance(value, str):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected text")
        if kind.startswith("tuple") and not isinstance(value, list):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected a list")
        values[field.name] = value
    return values
