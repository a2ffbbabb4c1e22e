"""Compare tokens per second from disk: ours, a memory map like nanoGPT's, webdataset, litdata, mosaicml-streaming.

Every contender yields int64 batches of 32 rows of 2,049 tokens through a DataLoader, in turns, in one run. Wall time
leaves out the first batches; CPU time is that of the process and its workers over all batches. The data is made first
and is in the page cache, so that the loaders are measured, not the disk. litdata and mosaicml-streaming run in their
own processes and environments, which ``stream_peer.py`` makes.

    python benchmarks/stream.py --out benchmarks/results/stream.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import webdataset as wds
from stream_peer import BATCH, LENGTH, PACKAGES, ROWS, Contender, environment, measure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.datamodules.sampling.buckets import Buckets
from rewurst.datamodules.sampling.micro_batches import MicroBatches, as_is
from rewurst.datamodules.sampling.mixture import Mixture, RunningShare
from rewurst.datamodules.sampling.permutation import CorpusOrder
from rewurst.datamodules.text import TokenReader
from rewurst.preparation.writing.token_writer import TokenWriter

LAYOUTS = {"litdata": "TokensLoader", "mosaicml-streaming": "one row per sample"}

Measurement = Callable[[int], tuple[float, float]]
versions = {"torch": torch.__version__, "webdataset": wds.__version__}


class Crops(Dataset[Tensor]):
    """Random crops of one flat file, as in nanoGPT."""

    def __init__(self, path: Path, batches: int) -> None:
        self.tokens, self.batches = np.memmap(path, dtype=np.uint16, mode="r"), batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> Tensor:
        begins = torch.randint(len(self.tokens) - LENGTH - 1, (BATCH,))
        rows = [torch.from_numpy(self.tokens[begin : begin + LENGTH + 1].astype(np.int64)) for begin in begins]
        return torch.stack(rows)


class Counted(Dataset[Any]):
    """First batches of an infinite dataset."""

    def __init__(self, inner: MicroBatches, batches: int) -> None:
        self.inner, self.batches = inner, batches

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, number: int) -> Any:
        return self.inner[number]


def make_data(folder: Path) -> None:
    """Write two corpora, the same rows one per member for webdataset, and a flat file."""
    random = np.random.default_rng(0)
    for name in ("new", "old"):
        tokens = random.integers(50_000, size=ROWS * LENGTH + 1, dtype=np.uint16)
        with TokenWriter(folder / name, name=name, sequence_length=LENGTH, vocab_size=50_000) as writer:
            writer.append(tokens)
            writer.close()
        if name == "new":
            tokens.tofile(folder / "flat.bin")
            with wds.TarWriter(str(folder / "single.tar")) as single:
                for row in range(ROWS):
                    part = tokens[row * LENGTH : (row + 1) * LENGTH + 1]
                    single.write({"__key__": f"{row:06d}", "npy": part})


def ours(folder: Path, batches: int, shuffle: Literal["full", "window"], share: float) -> Contender:
    """Return our loader: global batches of one micro-batch, with or without replay, widened after loading."""
    sources = [TokenShards(folder / name) for name in (("new", "old") if share else ("new",))]
    mixture = Mixture(BATCH, {"new": 1.0}, {"old": 1.0} if share else {}, RunningShare(share))
    orders = [[CorpusOrder(name, len(rows), 0, shuffle)] for name, rows in zip(mixture.names, sources, strict=True)]
    data = Counted(MicroBatches(Buckets(mixture), orders, sources, TokenReader(sources), range(BATCH)), batches)

    def load(workers: int) -> Iterable[Any]:
        for batch in DataLoader(data, batch_size=None, num_workers=workers, collate_fn=as_is):
            yield batch["input_ids"].long()

    return load


def memmap(folder: Path, batches: int) -> Contender:
    """Return a loader of random crops of a flat file."""
    return lambda workers: DataLoader(Crops(folder / "flat.bin", batches), batch_size=None, num_workers=workers)


def webdataset(folder: Path, batches: int, rows_per_member: int) -> Contender:
    """Return webdataset's usual pipeline: decode members, shuffle rows in a buffer of 1,000, batch."""
    tar = str(folder / "single.tar") if rows_per_member == 1 else str(folder / "new" / "new-000000.tar")

    def load(workers: int) -> Iterable[Any]:
        data = wds.WebDataset([tar] * max(1, workers), shardshuffle=False).decode().to_tuple("npy")
        if rows_per_member > 1:
            data = data.compose(split_rows)
        data = data.shuffle(1000).batched(BATCH).repeat()
        return take(DataLoader(data, batch_size=None, num_workers=workers), batches)

    return load


def split_rows(samples: Iterable[tuple[np.ndarray]]) -> Iterator[tuple[np.ndarray]]:
    """Yield one sample per row."""
    for (rows,) in samples:
        yield from ((row,) for row in rows)


def take(batches: Iterable[Any], number: int) -> Iterator[Any]:
    """Yield the first batches as int64 tensors."""
    for _, batch in zip(range(number), batches, strict=False):
        yield torch.as_tensor(np.asarray(batch[0]).astype(np.int64))


def elsewhere(peer: str, python: Path, folder: Path, batches: int) -> Measurement:
    """Return a measurement of a peer in its own process, after a short warm-up pass."""

    def run(workers: int) -> tuple[float, float]:
        options = ["--batches", str(batches), "--workers", str(workers)]
        found = json.loads(_peer(python, peer, "measure", str(folder), *options).splitlines()[-1])
        versions[peer] = found["version"]
        assert found["torch"] == torch.__version__
        return found["wall"], found["cpu"]

    return run


def _peer(python: Path, *arguments: str) -> str:
    script = Path(__file__).with_name("stream_peer.py")
    done = subprocess.run([str(python), str(script), *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def compare(folder: Path, batches: int, rounds: int, workers: int, pythons: dict[str, Path]) -> list[dict[str, Any]]:
    """Measure every contender in turns; return one row for each pair of ours and a peer, and each unit."""
    mine: dict[str, Contender] = {
        "full shuffle": ours(folder, batches, "full", 0.0),
        "window shuffle": ours(folder, batches, "window", 0.0),
        "5 % replay": ours(folder, batches, "full", 0.05),
    }
    peers: dict[str, tuple[str, Contender]] = {
        "flat file": ("memmap", memmap(folder, batches)),
        "256 rows per member": ("webdataset", webdataset(folder, batches, 256)),
        "one row per member": ("webdataset", webdataset(folder, batches, 1)),
    }
    here = [*mine.items(), *((name, contender) for name, (_, contender) in peers.items())]
    turns: dict[str, Measurement] = {name: partial(measure, contender, batches) for name, contender in here}
    turns |= {LAYOUTS[peer]: elsewhere(peer, python, folder, batches) for peer, python in pythons.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            found[name].append(turn(workers))
    results = []
    for name in mine:
        for layout, peer in [(name, peer) for name, (peer, _) in peers.items()] + [(LAYOUTS[p], p) for p in pythons]:
            for index, unit in enumerate(("tokens/s", "tokens/cpu-s")):
                a, b = (statistics.median(run[index] for run in found[key]) for key in (name, layout))
                what = f"{name}, {workers} workers, {layout}"
                row = {"what": what, "peer": peer, "ours": a, "theirs": b, "ratio": a / b, "unit": unit}
                spread = {
                    "runs_ours": [r[index] for r in found[name]],
                    "runs_theirs": [r[index] for r in found[layout]],
                }
                results.append(row | spread)
                print(f"{what}, {unit}: {a:.3g} and {b:.3g}, ratio {a / b:.2f}", flush=True)
    return results


def main() -> None:
    """Make the data, compare and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stream.json"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batches", type=int, default=420)
    for peer in PACKAGES:
        name = peer.partition("-")[0]
        parser.add_argument(
            f"--{name}",
            metavar="PYTHON",
            help=f"Python with it (default: .venv-{name}, made if missing); 'none' to skip",
        )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = {peer: getattr(arguments, peer.partition("-")[0]) for peer in PACKAGES}
    pythons = {peer: Path(path or environment(peer)) for peer, path in given.items() if path != "none"}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        for peer, python in pythons.items():
            _peer(python, peer, "make", folder)
        for workers in (0, 2):
            results += compare(Path(folder), arguments.batches, arguments.runs, workers, pythons)
    setting = {**versions, "device": platform.machine()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps([row | setting for row in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
