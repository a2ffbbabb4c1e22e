"""Folders that several processes or machines fill: on a disk that they share, or on object storage."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ... import UsageError
from ...datamodules.storage.random_access import is_remote, join, local_path, read_whole
from ...datamodules.storage.url import delete, find, refuse_unwritable, upload, write_object
from ...files import write_atomically, writing

UNFINISHED = ".preparing"
"""Folder within a target that holds what goes when all is done."""


@dataclass(frozen=True)
class Target:
    """A folder, or a URL of one; whatever is written appears whole or not at all.

    Args:
        root: Path or URL.

    Raises:
        UsageError: A URL that cannot be written to.
    """

    root: str

    @classmethod
    def for_engine(cls, engine: str, root: str | Path) -> Target:
        """Return the target of an engine; processes of a cluster may have another working directory."""
        return cls(everywhere(str(root)) if engine == "ray" else str(root))

    def __post_init__(self) -> None:
        if self.is_remote:
            refuse_unwritable(self.root)

    def __str__(self) -> str:
        return self.root

    @property
    def is_remote(self) -> bool:
        """Whether it is on a server."""
        return is_remote(self.root)

    def where(self, name: str) -> str:
        """Path or URL of a file, named by its path below the root."""
        return join(self.root, name)

    def read(self, name: str) -> bytes | None:
        """All of a small file, None where there is none.

        Raises:
            UsageError: It cannot be read.
        """
        try:
            return read_whole(self.where(name))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: str | bytes) -> None:
        """Make or replace a small file.

        Raises:
            UsageError: It cannot be written.
        """
        if self.is_remote:
            write_object(self.where(name), content.encode() if isinstance(content, str) else content)
            return
        path = self._path(name)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)

    def publish(self, file: Path, name: str) -> None:
        """Make or replace a file by one from :meth:`scratch` that is on the disk.

        Raises:
            UsageError: It cannot be written.
        """
        if self.is_remote:
            upload(file, self.where(name))
            return
        path = self._path(name)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, path)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a private folder on this machine, and delete it at the end of the block.

        For a target on a disk it is there, so that files move by renaming; :meth:`remove` deletes a killed process's.
        """
        parent = None if self.is_remote else self._path(UNFINISHED)
        if parent is not None:
            with writing(parent):
                parent.mkdir(parents=True, exist_ok=True)
        with writing(parent or Path(tempfile.gettempdir())):
            folder = Path(tempfile.mkdtemp(prefix="scratch-", dir=parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def names(self, folder: str = "") -> list[str]:
        """Files anywhere below a folder, by their paths below the root, sorted."""
        if self.is_remote:
            prefix = f"{folder}/" if folder else ""
            return [prefix + "/".join(url.below) for url in find(self.where(folder) if folder else self.root)]
        root = self._path("")
        paths = (path for path in (root / folder).rglob("*") if path.is_symlink() or not path.is_dir())
        return sorted(path.relative_to(root).as_posix() for path in paths)

    def remove(self, folder: str = "") -> None:
        """Delete a folder below the root, or all there is."""
        if self.is_remote:
            delete([self.where(name) for name in self.names(folder)])
        else:
            shutil.rmtree(self._path(folder), ignore_errors=True)  # another process may be at it too

    def refuse_file(self) -> None:
        """Raise where a file stands in its place."""
        if not self.is_remote and self._path("").exists() and not self._path("").is_dir():
            raise UsageError(f"out {self.root} is a file, expected a folder")

    def _path(self, name: str) -> Path:
        return local_path(self.root) / name


def everywhere(path: str) -> str:
    """Return a path that means the same in every working directory; a URL stays as it is."""
    return path if is_remote(path) else str(local_path(path).absolute())
