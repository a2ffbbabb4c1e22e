"""Compare tokens per second and peak memory of language model training with what a user would otherwise run.

Contenders (``lm_contenders.py``) train the same weights on the same rows, in turns, each run in its own process. Every
run measures wall and CPU seconds; medians over runs of medians over steps are compared. All must see the same losses.
The speed of matrix products on this machine is measured between the runs.

    python benchmarks/lm.py --out benchmarks/results/lm.json
    python benchmarks/lm.py --suite gpu --out ...          # one GPU: 405M parameters, 2,048 tokens, bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewurst.datamodules.corpora.index import Shard
from rewurst.datamodules.corpora.tokens import TokenIndex, TokenShards
from rewurst.preparation.writing.token_writer import TokenWriter

PYTHIA_70M = {"layers": 6, "width": 512, "heads": 8, "vocabulary": 50304, "length": 512, "rows": 8}
PYTHIA_410M = {"layers": 24, "width": 1024, "heads": 16, "vocabulary": 50304, "length": 2048, "rows": 16}
TINY = {"layers": 2, "width": 64, "heads": 2, "vocabulary": 512, "length": 64, "rows": 8}
SMALL = PYTHIA_70M | {"rows": 2}
GROWTH = {
    "length": [SMALL | {"length": length, "rows": 2048 // length} for length in (128, 512, 2048)],
    "vocabulary": [SMALL | {"vocabulary": entries} for entries in (8192, 50304, 131072)],
    "layers": [SMALL | {"layers": layers} for layers in (2, 6, 12)],
}
PARTS = ("train", "overhead", "documents", "growth", "indexes")
DOCUMENT = 128  # tokens between end tokens, on average
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the data sheets

Result = dict[str, Any]


class Bench:
    """Runner of contenders in separate processes.

    Args:
        threads: Number of threads per contender.
        device: Device, ``cpu`` or ``cuda``.
        prefix: Prefix of each command, such as ``numactl -N 0``.
        litgpt: Python of an environment with litgpt.
    """

    def __init__(self, threads: int, device: str, prefix: str, litgpt: str | None) -> None:
        self.threads, self.device, self.prefix, self.litgpt = threads, device, shlex.split(prefix), litgpt
        self.gemm: list[float] = []

    def run(self, name: str, shape: dict[str, int], warm: int, steps: int, **options: Any) -> Result:
        """Train once."""
        with tempfile.TemporaryDirectory() as folder:
            given = {**shape, "warm": warm, "steps": steps, "device": self.device, "options": options}
            given["folder"] = write_rows(Path(folder) / "rows", shape, (warm + steps) * shape["rows"])
            python = self.litgpt if name == "litgpt" else sys.executable
            command = [*self.prefix, str(python), str(Path(__file__).with_name("lm_contenders.py"))]
            # Threads that spin while waiting would count as CPU time.
            environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "passive"}
            done = subprocess.run(
                [*command, name, json.dumps(given), str(self.threads)],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        result: Result = json.loads(done.stdout.splitlines()[-1])
        for clock in ("seconds", "cpu_seconds"):
            result[clock] = statistics.median(result[clock])
        self.gemm.append(result["gemm"])
        seconds = f"{result['seconds']:.4g} s, {result['cpu_seconds']:.4g} CPU-s"
        print(
            f"  {name} {options or ''}: {seconds} per step, {result['peak'] / 1e9:.3f} GB", file=sys.stderr, flush=True
        )
        return result


def write_rows(folder: Path, shape: dict[str, int], rows: int) -> str:
    """Write a corpus of random tokens with ends of documents, and return its folder."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, shape["vocabulary"], size=rows * shape["length"] + 1)
    tokens[random.random(len(tokens)) < 1 / DOCUMENT] = 0
    sizes = {"sequence_length": shape["length"], "vocab_size": shape["vocabulary"]}
    with TokenWriter(folder, name="train", rows_per_sample=8, **sizes) as writer:
        writer.append(tokens)
        writer.close()
    return str(folder)


def compare(
    bench: Bench,
    what: str,
    shape: dict[str, int],
    peers: Sequence[str],
    rounds: int,
    steps: tuple[int, int],
    **ours: Any,
) -> list[Result]:
    """Compare ours with each peer: tokens per wall and CPU second, and peak memory."""
    names = ["ours", *peers]
    runs: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            compiled = {"compile": True} if bench.device == "cuda" and name == "raw loop" else {}
            runs[name].append(bench.run(name, shape, *steps, **(ours if name == "ours" else compiled)))
    same_losses(runs)
    tokens = shape["rows"] * shape["length"]
    return [row for peer in peers for row in rows_of(what, peer, runs["ours"], runs[peer], tokens)]


def same_losses(runs: dict[str, list[Result]]) -> None:
    """Check that all see the same first loss; transformers.Trainer leaves out each row's last token."""
    expected = runs["ours"][0]["losses"][0]
    for name, results in runs.items():
        for result in results:
            found = result["losses"][0]
            if abs(found / expected - 1) > (2e-3 if name == "transformers.Trainer" else 1e-4):
                raise SystemExit(f"the first loss of {name} is {found}, ours is {expected}")


def rows_of(what: str, peer: str, ours: list[Result], theirs: list[Result], tokens: int) -> list[Result]:
    """Return the results of one pair in the common format."""
    found = []
    for unit, key in (("tokens/s", "seconds"), ("tokens/cpu-s", "cpu_seconds"), ("bytes", "peak")):
        sides = [[run[key] for run in side] for side in (ours, theirs)]
        if unit != "bytes":
            sides = [[tokens / seconds for seconds in side] for side in sides]
        a, b = (statistics.median(side) for side in sides)
        row = {"what": what, "peer": peer, "ours": a, "theirs": b, "ratio": a / b, "unit": unit}
        found.append(row | {"runs_ours": sides[0], "runs_theirs": sides[1]})
        print(f"{what}, {peer}, {unit}: {a:.4g} and {b:.4g}, ratio {a / b:.3f}", flush=True)
    return found


def overhead(bench: Bench, rounds: int) -> Result:
    """Measure the milliseconds per step that Lightning, callbacks and data module add to our loss in a raw loop."""
    runs: dict[str, list[float]] = {"ours": [], "our loop": []}
    for _ in range(rounds):
        for name, seconds in runs.items():
            seconds.append(1000 * bench.run(name, TINY, 20, 300)["seconds"])
    a, b = (statistics.median(seconds) for seconds in runs.values())
    print(f"Lightning and callbacks: {a:.2f} ms per step, {b:.2f} in a loop, {a - b:.2f} more", flush=True)
    row = {"what": "step of a tiny model", "peer": "our loss in a raw loop", "ours": a, "theirs": b, "ratio": a / b}
    return row | {"unit": "ms", "runs_ours": runs["ours"], "runs_theirs": runs["our loop"]}


def grow(bench: Bench) -> list[Result]:
    """Compare with the raw loop as one size grows; others as Pythia-70M, 1,024 tokens per batch (2,048 by length)."""
    found = []
    for name, shapes in GROWTH.items():
        for shape in shapes:
            what = f"{name} {shape[name]}"
            found += compare(bench, what, shape, ["raw loop"], 1, (1, 3))
    return found


def documents(bench: Bench, rounds: int) -> list[Result]:
    """Measure the cost of keeping documents apart: ours with and without masks."""
    sides: list[list[Result]] = [[], []]
    for _ in range(rounds):
        for side, masks in zip(sides, (True, False), strict=True):
            side.append(bench.run("ours", PYTHIA_70M, 1, 3, document_masks=masks))
    tokens = PYTHIA_70M["rows"] * PYTHIA_70M["length"]
    return rows_of("document masks", "ours without", *sides, tokens)


def indexes() -> None:
    """Print an index's bytes and the milliseconds to open its corpus, for rows of 2,048 tokens, shards of 256 MiB."""
    for exponent in range(6, 12):
        rows, per_shard = 10**exponent // 2048, 65536 // 256 * 256
        sizes = [min(per_shard, rows - begin) for begin in range(0, rows, per_shard)]
        shards = tuple(Shard(f"train-{i:06d}.tar", n * 4098, -(-n // 256), n, f"{i:064x}") for i, n in enumerate(sizes))
        index: dict[str, Any] = {"dtype": "uint16", "sequence_length": 2048, "rows_per_sample": 256, "rows": rows}
        index |= {"tokens": rows * 2048, "vocab_size": 50304, "end_token": 0, "tokenizer_sha256": "", "sources": ()}
        index |= {"kind": "text", "version": 1, "dropped_tokens": 0, "documents": 0}
        with tempfile.TemporaryDirectory() as folder:
            TokenIndex(**index, shards=shards).save(folder)
            size = (Path(folder) / "index.json").stat().st_size
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                TokenShards(folder).fingerprint()
                times.append(time.perf_counter() - begin)
        sidecars = 8 * sum(shard.samples + 1 for shard in shards)
        opened = 1000 * statistics.median(times)
        print(
            f"1e{exponent} tokens: {len(shards)} shards, index {size} bytes, sidecars {sidecars}, open {opened:.2f} ms"
        )


def flops(shape: dict[str, int]) -> tuple[float, float]:
    """Return a step's FLOPs of matrix products, and by the usual formula, 6 N + 12 L d T per token.

    The formula counts all parameters. The first number leaves out the input embedding, which is only looked up, and
    counts both halves of causal attention, as they are computed.
    """
    layers, width, vocabulary, length = (shape[name] for name in ("layers", "width", "vocabulary", "length"))
    tokens = shape["rows"] * length
    blocks, attention = 12 * layers * width**2, 12 * layers * width * length
    matrices = 6 * (blocks + vocabulary * width) + attention
    return tokens * matrices, tokens * (6 * (blocks + 2 * vocabulary * width) + attention)


def utilization(bench: Bench, results: list[Result], shape: dict[str, int]) -> Result:
    """Return the step's share of the machine's peak."""
    speed = next(row["ours"] for row in results if row["unit"] == "tokens/s")
    done, formula = (value * speed / (shape["rows"] * shape["length"]) for value in flops(shape))
    if bench.device == "cuda":
        name = torch.cuda.get_device_name()
        peak, done = next((value for key, value in PEAK_FLOPS.items() if key in name), float("nan")), formula
    else:
        peak = statistics.median(bench.gemm)
    print(f"utilization: {done / 1e9:.4g} of {peak / 1e9:.4g} GFLOP/s, {done / peak:.1%}", flush=True)
    return {"what": "utilization", "peer": "peak", "ours": done, "theirs": peak, "ratio": done / peak, "unit": "FLOP/s"}


def main(args: Sequence[str] | None = None) -> None:
    """Measure the requested parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lm.json"))
    parser.add_argument("--suite", choices=("cpu", "gpu", "tiny"), default="cpu")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="parts of the suite cpu; others stay in OUT"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--add", type=Path, nargs="*", help="earlier results whose runs to include")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix", default="", help="prefix of each command, such as 'numactl -N 0'")
    parser.add_argument("--litgpt", help="Python of an environment with litgpt")
    arguments = parser.parse_args(args)
    gpu = arguments.suite == "gpu"
    bench = Bench(arguments.threads, "cuda" if gpu else "cpu", arguments.prefix, arguments.litgpt)
    device = torch.cuda.get_device_name() if gpu else platform.machine()
    setting = {"torch": torch.__version__, "device": device, "threads": arguments.threads, "date": time.strftime("%F")}
    parts = arguments.parts if arguments.suite == "cpu" else [arguments.suite]
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for part in parts:
        rows = measure(bench, part, arguments.rounds) if arguments.rounds else []
        for path in arguments.add or []:
            rows = together(rows, [row for row in json.loads(path.read_text()) if row["part"] == part])
        kept = [row for row in kept if row["part"] != part] + [row | setting | {"part": part} for row in rows]
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(kept, indent=2) + "\n")


def together(rows: list[Result], earlier: list[Result]) -> list[Result]:
    """Return the rows over the runs of both results; a single number counts as one run."""
    if not rows or not earlier:
        return rows or earlier
    found = []
    for a, b in zip(rows, earlier, strict=True):
        assert (a["what"], a["peer"], a["unit"]) == (b["what"], b["peer"], b["unit"])
        row = dict(a)
        for side in ("ours", "theirs"):
            runs = [*b.get(f"runs_{side}", [b[side]]), *a.get(f"runs_{side}", [a[side]])]
            row |= {f"runs_{side}": runs, side: statistics.median(runs)}
        found.append(row | {"ratio": row["ours"] / row["theirs"]})
    return found


def measure(bench: Bench, part: str, rounds: int) -> list[Result]:
    """Measure one part of the table."""
    peers = ["raw loop", "transformers.Trainer"]
    if part == "gpu":
        results = compare(bench, "405M, 16 x 2048, bfloat16", PYTHIA_410M, peers, min(rounds, 2), (8, 12), compile=True)
        return [*results, utilization(bench, results, PYTHIA_410M)]
    if part == "tiny":
        return compare(bench, "tiny", TINY, peers, rounds, (2, 5))
    if part == "train":
        peers += ["litgpt"] if bench.litgpt else []
        results = compare(bench, "Pythia-70M, 8 x 512, fp32", PYTHIA_70M, peers, rounds, (1, 2))
        return [*results, utilization(bench, results, PYTHIA_70M)]
    if part == "overhead":
        return [overhead(bench, rounds)]
    if part == "documents":
        return documents(bench, min(rounds, 3))
    if part == "growth":
        return grow(bench)
    indexes()  # only printed: there is no peer to compare with
    return []


if __name__ == "__main__":
    main()
