"""List the files behind sources: files, folders, URLs and built-in corpora, in a fixed order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ... import UsageError
from ...datamodules.storage.random_access import is_remote
from ...datamodules.storage.url import Place, Url, find, place
from ...hints import did_you_mean
from . import builtin_text as builtin
from .compressed_files import COMPRESSIONS
from .skipped import Skipped

PLAIN_TEXT = (".txt", ".md")
PLAIN_KINDS = (*PLAIN_TEXT, ".jsonl", ".json", ".csv", ".tsv")
KINDS = (*PLAIN_KINDS, ".parquet", ".arrow", ".tar")
SPLITS_FILE = "dataset_dict.json"
# Files of a folder of `datasets.save_to_disk` that have no text; the second lists the files that have.
DATASET_FILES = ("dataset_info.json", "state.json", SPLITS_FILE)


@dataclass(frozen=True)
class SourceFile:
    """A file or a built-in corpus; ``kind`` is its suffix without compression, or ``builtin``."""

    name: str
    kind: str


def expand(sources: Sequence[str], skipped: Skipped) -> list[SourceFile]:
    """List the files behind ``sources``, in the order given; files of a folder are sorted by path.

    Raises:
        UsageError: No sources, a path that does not exist, a file of unknown kind, a folder without a readable file.
    """
    if not sources:
        raise UsageError(f"no sources given, expected {expected()}")
    files: list[SourceFile] = []
    for source in sources:
        path = Path(source)
        if source.startswith(builtin.PREFIX):
            builtin.documents(source)  # refuses a misspelled name now, not after the files before it
            files.append(SourceFile(source, "builtin"))
        elif is_remote(source):
            files += _expand_url(Url(source), skipped)
        elif path.is_dir():
            files += _expand_folder(path, skipped)
        elif not path.exists():
            raise UsageError(f"source {source}: no such file or folder{did_you_mean(path)}")
        elif (kind := _kind(path)) is None:
            raise UsageError(f"source {source}: unknown kind {path.suffix or path.name!r}, expected {expected()}")
        else:
            files.append(SourceFile(source, kind))
    return files


def identity(file: SourceFile) -> tuple[str, int, str]:
    """Return the name, the size in bytes, and a tag that changes when the file does (only the name if built in).

    Raises:
        UsageError: There is no such file.
    """
    if file.kind == "builtin":
        return file.name, 0, ""
    where = place(file.name)
    try:
        if isinstance(where, Url):
            return file.name, *where.describe()
        status = where.stat()
    except OSError as error:
        raise UsageError(f"source {where}: cannot be read ({error.strerror or error})") from None
    return file.name, status.st_size, str(status.st_mtime_ns)


def expected() -> str:
    """Return the kinds of sources, for messages."""
    built_in = f"{builtin.PREFIX}prose or {builtin.PREFIX}code"
    return (
        f"{', '.join(PLAIN_KINDS)} (or these with {' or '.join(COMPRESSIONS)}), .parquet, .arrow, .tar, a folder, "
        f"{built_in}"
    )


def _kind(path: Place) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return suffixes[0] if suffixes[0] in PLAIN_KINDS else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def _expand_folder(folder: Path, skipped: Skipped) -> list[SourceFile]:
    paths = sorted(walk(folder), key=lambda path: path.relative_to(folder).parts)
    found = []
    for path in _without_dataset_files(paths):
        kind = None if path.is_dir() else _kind(path)
        if kind is None:
            skipped.unknown_files.append(str(path))
        else:
            found.append(SourceFile(str(path), kind))
    if not found:
        raise UsageError(f"source {folder}: the folder has no file of a known kind, expected {expected()}")
    return found


def _without_dataset_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield paths without the files in which `datasets.save_to_disk` describes a data set, its data in their order.

    Raises:
        UsageError: A folder has several splits, or a data set is not complete.
    """
    order: dict[Path, list[Path]] = {}
    for path in paths:
        if path.name == SPLITS_FILE:
            splits = _listed(path, "splits")
            raise UsageError(
                f"source {path.parent}: a data set with the splits {', '.join(splits)}; name the one to read, such as "
                f"{path.parent / splits[0] if splits else path.parent}"
            )
        if path.name == "state.json" and path.with_name("dataset_info.json") in paths:
            order[path.parent] = [path.with_name(name) for name in _listed(path, "_data_files")]
            for part in order[path.parent]:
                if part not in paths:
                    raise UsageError(f"source {path.parent}: {part.name}, which state.json lists, is not there")
    for path in paths:
        listed = order.get(path.parent)
        if listed is None:
            yield path
        elif path == listed[0]:
            yield from listed
        elif path not in listed and path.name not in DATASET_FILES:
            yield path  # a file of the user's own; a cache of `datasets` is .arrow too, and not listed


def _listed(path: Path, key: str) -> list[str]:
    try:
        values = json.loads(path.read_text(encoding="utf8"))[key]
        return [value if isinstance(value, str) else value["filename"] for value in values]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({error!r}); save the data set again") from None


def _expand_url(url: Url, skipped: Skipped) -> list[SourceFile]:
    """List the object at a URL if its kind is known, else all objects below it."""
    if (kind := _kind(url)) is not None:
        identity(SourceFile(url.url, kind))
        return [SourceFile(url.url, kind)]
    found = []
    for below in find(url.url):
        kind = _kind(below)
        if kind is None or below.name in DATASET_FILES:
            skipped.unknown_files.append(str(below))
        else:
            found.append(SourceFile(below.url, kind))
    if not found:
        raise UsageError(f"source {url}: no such folder, or none with a file of a known kind, expected {expected()}")
    return found


def walk(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders, and links to folders.

    Raises:
        UsageError: A folder in it cannot be read.
    """
    for inside, folders, names in os.walk(folder, onerror=_cannot_list):
        # Links to folders are not followed, because they can form a loop: they count as unknown files.
        links = [name for name in folders if Path(inside, name).is_symlink()]
        yield from (Path(inside, name) for name in [*names, *links])


def _cannot_list(error: OSError) -> None:
    raise UsageError(f"source {error.filename}: the folder cannot be read ({error.strerror})")


def total_bytes(files: Iterable[SourceFile]) -> int:
    """Return the size of all files."""
    return sum(identity(file)[1] for file in files)
