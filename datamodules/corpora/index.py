"""The ``index.json`` of a corpus folder. It is written last: a folder without it is unfinished."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeGuard

from ... import UsageError
from ...files import write_atomically, writing
from ...hints import did_you_mean
from ..storage.random_access import is_remote, join, read_whole

INDEX_FILE = "index.json"
VERSION = 1
ABSENT_IF_EMPTY = {"absent_if_empty": True}
"""Metadata of a field that is written only if it is not empty, so that fingerprints of older corpora do not change."""
HOW_TO_MAKE = "make one with `rewurst prepare text|images SOURCE... --out DIR`, or `rewurst prepare index SHARD...`"


@dataclass(frozen=True)
class Shard:
    """One tar of a corpus.

    Attributes:
        name: File name.
        bytes: Size of the file.
        samples: Number of samples in the tar.
        rows: Number of rows in all samples.
        sha256: SHA-256 of the file.
        url: URL of the tar, if it is not next to the index.
    """

    name: str
    bytes: int
    samples: int
    rows: int
    sha256: str
    url: str = ""

    @property
    def idx_name(self) -> str:
        """Name of the sidecar file: ``code-000001.idx`` for ``code-000001.tar``."""
        return Path(self.name).with_suffix(".idx").name


@dataclass(frozen=True, kw_only=True)
class CorpusIndex:
    """Fields of ``index.json`` that all kinds of corpora have.

    Attributes:
        shards: Tars in the order of the stream.
        rows: Total number of rows.
        sources: Sources as given when the corpus was prepared.
    """

    shards: tuple[Shard, ...]
    rows: int
    sources: tuple[str, ...]
    version: int = VERSION
    kind: str
    shard_names: ClassVar[str] = r"[^/\\\0]+\.tar"

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read and check the ``index.json`` of ``folder``, which may be a URL.

        Raises:
            UsageError: The folder is missing, unfinished, of another kind or of a newer version, or its index
                contradicts itself.
        """
        where, content = read_index(folder)
        kind = _default(cls, "kind")
        if content.get("kind") != kind:
            raise UsageError(f"{where}: kind is {content.get('kind')!r}, expected {kind!r}")
        values = _fields_of(where, cls, content)
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        values["shards"] = tuple(
            Shard(**_fields_of(f"{where}, shards[{i}]", Shard, shard)) for i, shard in enumerate(values["shards"])
        )
        index = cls(**values)
        index.check(where)
        return index

    def check(self, where: str) -> None:
        """Raise ``UsageError`` if the index at ``where`` contradicts itself."""
        rows = sum(shard.rows for shard in self.shards)
        if self.rows != rows:
            raise UsageError(f"{where}: rows is {self.rows}, expected {rows}; prepare the corpus again")
        names = set()
        for shard in self.shards:
            if not re.fullmatch(self.shard_names, shard.name):
                ending = " that ends in .tar" if self.shard_names.endswith("tar") else ""
                raise UsageError(f"{where}: shard name is {shard.name!r}, expected a plain file name{ending}")
            if shard.name in names:
                raise UsageError(f"{where}: lists {shard.name} twice")
            names.add(shard.name)

    def save(self, folder: str | Path) -> None:
        """Write ``index.json`` atomically, so that readers never see part of it."""
        path = Path(folder) / INDEX_FILE
        with writing(path):
            write_atomically(path, self.content())

    def content(self) -> str:
        """Return the text of ``index.json``."""
        return json.dumps({name: value for name, value in asdict(self).items() if self._says(name)}, indent=1) + "\n"

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides which sample has which number; locations do not count."""
        content = {
            "shards": [(shard.rows, shard.sha256) for shard in self.shards],
            **{
                field.name: getattr(self, field.name)
                for field in fields(self)
                if field.name not in ("shards", "sources", "version", *self.not_in_fingerprint())
                and self._says(field.name)
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _says(self, name: str) -> bool:
        [field] = [field for field in fields(self) if field.name == name]
        return bool(getattr(self, name)) or not field.metadata.get("absent_if_empty")

    @classmethod
    def not_in_fingerprint(cls) -> tuple[str, ...]:
        """Return the names of fields that do not affect the fingerprint."""
        return ()


def read_index(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """Return the path and the content of a folder's index; only its version has been checked.

    Raises:
        UsageError: There is no index, or it is not a JSON object.
    """
    where = join(str(folder), INDEX_FILE)
    try:
        content = json.loads(read_whole(where))
    except FileNotFoundError:
        raise UsageError(where_absent(folder)) from None
    except ValueError as error:
        raise UsageError(f"{where}: not valid JSON ({error}); prepare the corpus again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{where}: contains a {type(content).__name__}, expected an object")
    version = content.get("version")
    if not _is_count(version) or not 1 <= version <= VERSION:
        raise UsageError(f"{where}: version is {version!r}, this rewurst reads versions up to {VERSION}")
    return where, content


def where_absent(folder: str | Path) -> str:
    """Return one line that says why a folder is not a corpus and how to make one."""
    if is_remote(str(folder)):
        return f"no corpus at {folder}: it has no {INDEX_FILE}; {HOW_TO_MAKE}"
    folder = Path(folder)
    if not folder.exists():
        return f"no corpus at {folder}{did_you_mean(folder) or ':'} {HOW_TO_MAKE}"
    if not folder.is_dir():
        return f"{folder} is a file, expected the folder of a prepared corpus: {HOW_TO_MAKE}"
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{INDEX_FILE}"))
    if inside:
        return f"{folder} has no {INDEX_FILE}; did you mean {' or '.join(inside)}?"
    return f"{folder} has no {INDEX_FILE}: its preparation did not finish, or it is not a corpus; {HOW_TO_MAKE}"


def _default(cls: type, name: str) -> Any:
    return next(field.default for field in fields(cls) if field.name == name)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fields_of(where: str | Path, cls: type, content: Any) -> dict[str, Any]:
    """Return the entries of ``content`` that are fields of ``cls``, each checked against the field's type."""
    if not isinstance(content, dict):
        raise UsageError(f"{where}: contains a {type(content).__name__}, expected an object")
    values = {}
    for field in fields(cls):
        kind = str(field.type)
        value = content.get(field.name, None if field.default is MISSING else field.default)
        if not _is_count(value) and (kind == "int" or (kind == "int | None" and value is not None)):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected a whole number from 0")
        if kind == "bool" and not isinstance(value, bool):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected true or false")
        if kind == "str" and not isinstance(value, str):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected text")
        if kind.startswith("tuple") and not isinstance(value, list | tuple):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected a list")
        if kind.startswith("tuple[int") and not all(map(_is_count, value or ())):
            raise UsageError(f"{where}: {field.name} is {value!r}, expected a list of whole numbers from 0")
        values[field.name] = value
    return values
