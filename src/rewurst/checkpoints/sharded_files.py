"""Files of sharded checkpoints: read with restricted unpickling, and moved into place atomically."""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import shutil
import sys
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from .. import UsageError
from .checksums import check_file

Shapes = dict[str, dict[str, Tensor]]
"""Tensors without values, by key of the checkpoint and name."""

LEFTOVERS = ".*.ckpt.*.tmp"
"""Pattern of the names of checkpoints that are being written, replaced or removed."""
ASIDE = ".old.tmp"
"""Suffix of a checkpoint that is being replaced, after the name of its replacement."""

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that accepts only the classes that describe tensors."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name.split(".")[0] == "pathlib" and global_name in ("PosixPath", "WindowsPath"):
            return PurePosixPath  # only the path at which it was first written
        value = getattr(torch, global_name, None) if module_name == "torch" else None
        if (module_name, global_name) in _ALLOWED or isinstance(value, torch.dtype):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"{module_name}.{global_name}")


class SafeReader(FileSystemReader):
    """Torch's reader with restricted unpickling of ``.metadata``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the description of all tensors.

        Raises:
            UsageError: The file is not valid or contains other objects.
        """
        metadata = read_metadata(Path(self.path))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        cast(StorageMeta, metadata.storage_meta).load_id = str(uuid.uuid4())
        return metadata


def read_metadata(folder: Path) -> Metadata:
    """Return the description of all tensors in a folder.

    Raises:
        UsageError: The file is missing, damaged or contains other objects.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a sharded checkpoint: it has no .metadata") from None
    except pickle.UnpicklingError as error:
        raise UsageError(f"{folder}/.metadata contains a pickled {error}, which is not loaded") from None
    except (EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise UsageError(f"{folder}/.metadata cannot be read ({error}): copy the folder again") from None
    if not isinstance(metadata, Metadata):
        raise UsageError(f"{folder}/.metadata contains a {type(metadata).__name__}: copy the folder again")
    return metadata


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the content of a folder besides the tensors of the module and the optimizers.

    Raises:
        UsageError: The file is missing, damaged or would need unpickling.
    """
    if not is_sharded(folder):
        raise UsageError(f"{folder} is not a sharded checkpoint: meta.pt or .metadata is missing")
    check_file(folder / "meta.pt")
    try:
        meta: dict[str, Any] = torch.load(folder / "meta.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UsageError(f"{folder}/meta.pt cannot be read: {str(error).splitlines()[0]}") from None
    return meta


def shapes(folder: Path) -> Shapes:
    """Return the names, shapes and types of all tensors in a folder.

    Raises:
        UsageError: See :func:`read_metadata`.
    """
    found: Shapes = {}
    for full, entry in read_metadata(folder).state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            key, name = full.split(".", 1)
            found.setdefault(key, {})[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return found


def missing_files(folder: Path) -> list[str]:
    """Return the names of tensor files that are missing from a folder or truncated.

    Raises:
        UsageError: See :func:`read_metadata`.
    """
    ends: dict[str, int] = {}
    stored: Mapping[Any, Any] = read_metadata(folder).storage_data or {}
    for part in stored.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    return [name for name, end in sorted(ends.items()) if not _holds(folder, name, end)]


def require_files(folder: Path) -> None:
    """Refuse a folder with missing or truncated files.

    Raises:
        UsageError: A file is missing; the message names the first.
    """
    if missing := missing_files(folder):
        raise UsageError(f"{folder} lacks {missing[0]} or part of it: copy the checkpoint again, or use another")


def is_whole(path: Path) -> bool:
    """Return whether a folder is a complete sharded checkpoint."""
    try:
        return is_sharded(path) and zipfile.is_zipfile(path / "meta.pt") and not missing_files(path)
    except UsageError:
        return False


def exchange(new: Path, target: Path) -> None:
    """Swap a new folder with the one at its target, atomically if the file system can.

    Other file systems (NFS) need two renames: if the process is killed between them, the target is missing until
    :func:`tidy` runs.
    """
    if not os.path.lexists(target):
        os.rename(new, target)
        return
    if sys.platform == "linux" and _renameat2(new, target):
        return
    aside = new.with_name(new.name + ASIDE)
    os.rename(target, aside)
    os.rename(new, target)
    os.rename(aside, new)


def tidy(leftover: Path) -> str:
    """Remove a leftover of a killed save, or restore what :func:`exchange` had moved; return which was done."""
    name = leftover.name.removeprefix(".").removesuffix(f".tmp{ASIDE}").rpartition(".")[0]
    if leftover.name.endswith(ASIDE) and not os.path.lexists(leftover.with_name(name)):
        os.rename(leftover, leftover.with_name(name))
        return "restored"
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)
    return "removed"


def _renameat2(new: Path, target: Path) -> bool:
    """Swap two names with a Linux system call; return whether it is supported."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    at_working_folder, exchange_both = -100, 2
    if function(at_working_folder, os.fsencode(new), at_working_folder, os.fsencode(target), exchange_both) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def _holds(folder: Path, name: str, size: int) -> bool:
    path = folder / name
    return path.parent == folder and path.is_file() and path.stat().st_size >= size


def is_sharded(path: Path) -> bool:
    """Return whether a path is a folder of shards written by :class:`~rewurst.callbacks.FSDP`, complete or not."""
    return (path / ".metadata").is_file() and (path / "meta.pt").is_file()
