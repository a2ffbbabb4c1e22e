"""Folders that preparation fills: empty to begin with, or overwritten where they are recognisably of the same kind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ... import UsageError
from ...files import writing
from ...tokenizer_files import TOKENIZER_FILES
from .destination import UNFINISHED

# A layout is a pattern that the path of every file in the folder matches; temporary files of a killed run included.
_TOKENIZER = rf"\.?({'|'.join(map(re.escape, TOKENIZER_FILES))})(\.\w+)*"
TOKENIZER_LAYOUT = re.compile(_TOKENIZER)
_UNFINISHED = rf"{re.escape(UNFINISHED)}/.+"  # of a preparation in units that was stopped
CORPUS_LAYOUT = re.compile(
    rf"(train|val)/([^/]+-\d{{6,}}\.(tar|idx)|\.?index\.json(\.\w+)*|tokenizer/{_TOKENIZER})|{_UNFINISHED}"
)
LATENT_LAYOUT = re.compile(
    rf"latents-\d{{6,}}\.(tar|idx)|\.?(facts\.npy|empty_text\.npy|index\.json)(\.\w+)*|{_UNFINISHED}"
)
IMAGE_LAYOUT = re.compile(
    rf"(train|val|test|unseen)/([^/]+-\d{{6,}}\.(tar|idx)|\.?(facts\.npy|index\.json)(\.\w+)*)|{_UNFINISHED}"
)


def shard_name(source: str, otherwise: str) -> str:
    """Return the name of shards: that of the source, reduced to what any file system and webdataset's braces take."""
    stem = source.rpartition(":")[2].rstrip("/").rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_]+", "_", stem).strip("_") or otherwise


def make_folder(folder: Path, layout: re.Pattern[str], overwrite: bool) -> None:
    """Make ``folder`` an empty folder.

    Raises:
        UsageError: It is not empty and ``overwrite`` is not asked for, or it holds what ``layout`` does not know.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out {folder} is a file, expected a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UsageError(f"out {folder} is not empty; choose another folder or add --overwrite")
        files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
        for name in sorted(path.relative_to(folder).as_posix() for path in files):
            if not layout.fullmatch(name):
                raise UsageError(f"out {folder} holds {name}, which preparation does not make: not overwritten")
        with writing(folder):
            shutil.rmtree(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
