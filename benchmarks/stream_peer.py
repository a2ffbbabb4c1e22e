"""Measure a peer that needs its own environment, for ``stream.py``, and print JSON.

The virtual environment falls back to the packages of this one, so that both sides run on the same torch and NumPy.
litdata needs boto3, whose python-dateutil is older than ours. mosaicml-streaming requires older NumPy and transformers
and the clients of five clouds, so it is installed only with the dependencies needed for reading.

    python benchmarks/stream_peer.py litdata make FOLDER
    python benchmarks/stream_peer.py litdata measure FOLDER --batches 420 --workers 2
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

LENGTH, BATCH, ROWS = 2048, 32, 16384
WARM_UP = 20
PACKAGES = {
    "litdata": ["litdata==0.2.76", "boto3==1.43.117", "botocore==1.43.117", "python-dateutil==2.9.0.post0"],
    "mosaicml-streaming": [
        "--no-deps", "mosaicml-streaming==0.13.0", "Brotli==1.2.1", "python-snappy==0.7.3", "cramjam==2.14.0",
        "xxhash==4.1.0", "zstd==1.5.7.2", "catalogue==2.0.10",
    ],
}  # fmt: skip

Contender = Callable[[int], Iterable[Any]]


def environment(peer: str) -> Path:
    """Return the Python of ``.venv-<peer>`` next to this checkout's ``.venv``, which is made if missing."""
    folder = Path(__file__).resolve().parent.parent / f".venv-{peer.partition('-')[0]}"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        ours = sysconfig.get_path("purelib")
        theirs = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (theirs / "zz_ours.pth").write_text(f"{ours}\n")
        command = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *PACKAGES[peer]]
        subprocess.run(command, check=True)
        (folder / ".installed").touch()
    return python


def measure(contender: Contender, batches: int, workers: int) -> tuple[float, float]:
    """Return tokens per second of wall time after the first batches, and per second of CPU time over all."""
    before, begin, end, seen, batch = _cpu(), 0.0, 0.0, 0, None
    for batch in contender(workers):  # noqa: B007  # the last one is checked below
        seen += 1
        end = time.perf_counter()
        if seen == WARM_UP + 1:
            begin = end
        if seen == batches:
            break
    wall = end - begin  # without stopping the workers
    assert seen == batches, (seen, batches)
    tokens = batch["input_ids"] if isinstance(batch, dict) else batch
    assert (tuple(tokens.shape), tokens.dtype) == ((BATCH, LENGTH + 1), torch.int64)
    return (batches - WARM_UP - 1) * BATCH * LENGTH / wall, batches * BATCH * LENGTH / (_cpu() - before)


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _chunk(part: int, path: str) -> Iterable[Tensor]:
    tokens = np.fromfile(path, dtype=np.uint16)
    yield torch.from_numpy(np.array_split(tokens, 4)[part])


def _stacked(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows).to(torch.int64)


def _stacked_arrays(rows: list[dict[str, Any]]) -> Tensor:
    return torch.from_numpy(np.stack([row["tokens"] for row in rows]).astype(np.int64))


def make_litdata(folder: Path) -> None:
    """Write the flat file's tokens with ``optimize`` in chunks of 64 MB."""
    from litdata import TokensLoader, optimize

    optimize(
        fn=partial(_chunk, path=str(folder / "flat.bin")), inputs=list(range(4)), output_dir=str(folder / "litdata"),
        chunk_bytes="64MB", num_workers=1, item_loader=TokensLoader(block_size=LENGTH + 1),
    )  # fmt: skip


def litdata(folder: Path) -> Contender:
    """Return litdata's loader of shuffled blocks of 2,049 tokens."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    def load(workers: int) -> Iterable[Any]:
        blocks = TokensLoader(block_size=LENGTH + 1)
        data = StreamingDataset(str(folder / "litdata"), item_loader=blocks, shuffle=True, drop_last=True)
        return StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=_stacked)  # type: ignore

    return load


def make_mosaicml(folder: Path) -> None:
    """Write the flat file's rows as fixed-size arrays in uncompressed shards of the default size."""
    from streaming import MDSWriter

    tokens = np.fromfile(folder / "flat.bin", dtype=np.uint16)
    columns = {"tokens": f"ndarray:uint16:{LENGTH + 1}"}
    with MDSWriter(out=str(folder / "mosaicml"), columns=columns) as writer:
        for row in range(ROWS):
            writer.write({"tokens": tokens[row * LENGTH : (row + 1) * LENGTH + 1]})


def mosaicml(folder: Path) -> Contender:
    """Return a standard loader with the default shuffle."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    def load(workers: int) -> Iterable[Any]:
        clean_stale_shared_memory()
        data = StreamingDataset(local=str(folder / "mosaicml"), shuffle=True, batch_size=BATCH)
        return DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=_stacked_arrays, drop_last=True)

    return load


def main() -> None:
    """Make a peer's data, or measure it once after a short warm-up pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PACKAGES))
    parser.add_argument("task", choices=["make", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=int, default=420)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make, contender = {
        "litdata": (make_litdata, litdata),
        "mosaicml-streaming": (make_mosaicml, mosaicml),
    }[arguments.peer]
    if arguments.task == "make":
        make(arguments.folder)
        return
    load = contender(arguments.folder)
    measure(load, WARM_UP + 10, arguments.workers)
    wall, cpu = measure(load, arguments.batches, arguments.workers)
    print(json.dumps({"wall": wall, "cpu": cpu, "version": version(arguments.peer), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
