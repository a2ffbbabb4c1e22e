"""Compare images per second from JPEG bytes to resized pixels: ours with simplejpeg and with Pillow, and two peers.

Every contender turns the same files into uint8 pictures whose shortest side fits the target, center-cropped to a
square. Plain Pillow decodes the whole file and resizes with Lanczos; torchvision decodes it and resizes with its
antialiased bicubic filter. All run in one thread, in turns, in one run. The files are smooth noise at several scales,
compressed with quality 90 and 4:2:0, with about as many bits per pixel as photographs.

    python benchmarks/decoding.py --out benchmarks/results/images.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional

from rewurst.datamodules.imaging import decoding
from rewurst.datamodules.imaging.decoding import decode, read_header
from rewurst.datamodules.imaging.geometry import crop, resample, size_to_decode

Contender = Callable[[bytes, int], Any]

CASES = ((512, 512), (512, 256), (1024, 512), (1024, 256))  # side of the files, side of the target
FILES = 8


def ours(data: bytes, side: int, simplejpeg: bool) -> NDArray[np.uint8]:
    """Decode like the data module: header, crop, a JPEG reduced while decoding, one resampling."""
    header = read_header(data)
    size, target = (header.height, header.width), (side, side)
    shown = crop(size, target)
    pixels = decode(data, size_to_decode(size, shown, target), simplejpeg=simplejpeg)
    return resample(pixels, size, shown, target)


def plain_pillow(data: bytes, side: int) -> NDArray[np.uint8]:
    """Decode, resize and crop in the usual way."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    by = side / min(image.size)
    image = image.resize((round(image.width * by), round(image.height * by)), Image.Resampling.LANCZOS)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def by_torchvision(data: bytes, side: int) -> torch.Tensor:
    """Decode with ``decode_jpeg``, ``resize`` and ``center_crop``."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels = torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB)
    resized = functional.resize(pixels, [side], functional.InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(resized, [side, side])


def make_files(side: int) -> list[bytes]:
    """Return JPEGs that are ``side`` high and a quarter wider."""
    files = []
    for number in range(FILES):
        random, width = np.random.default_rng(number), side * 5 // 4
        total = np.full((side, width, 3), 128.0)
        for cells, amplitude in ((4, 60.0), (16, 40.0), (64, 25.0), (256, 12.0)):
            for channel in range(3):
                coarse = Image.fromarray(random.normal(size=(cells, cells)).astype(np.float32))
                fine = coarse.resize((width, side), Image.Resampling.BICUBIC)
                total[..., channel] += amplitude * np.asarray(fine)
        file = io.BytesIO()
        Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def measure(contender: Contender, files: list[bytes], side: int, seconds: float) -> float:
    """Return the images per second over whole passes of the files, for about ``seconds``."""
    done, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        for data in files:
            contender(data, side)
        done += len(files)
    return done / passed


def compare(case: tuple[int, int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure every contender in turns; return one row for each pair of ours and a peer."""
    stored, side = case
    files = make_files(stored)
    mine: dict[str, Contender] = {"Pillow": partial(ours, simplejpeg=False)}
    if decoding._simplejpeg is not None:
        mine["simplejpeg"] = partial(ours, simplejpeg=True)
    peers: dict[str, Contender] = {"Pillow, plain": plain_pillow, "torchvision": by_torchvision}
    contenders = mine | peers
    for contender in contenders.values():
        contender(files[0], side)
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            runs[name].append(measure(contender, files, side, seconds))
    rows = []
    for name in mine:
        for peer in peers:
            a, b = statistics.median(runs[name]), statistics.median(runs[peer])
            what = f"JPEG of {stored} px to {side} px, with {name}"
            row = {"what": what, "peer": peer, "ours": a, "theirs": b, "ratio": a / b, "unit": "images/s"}
            spread = {"runs_ours": runs[name], "runs_theirs": runs[peer]}
            rows.append(row | spread | {"bytes_per_file": statistics.mean(map(len, files))})
            print(f"{what}, compared with {peer}: {a:.1f} and {b:.1f} images/s, ratio {a / b:.2f}", flush=True)
    return rows


def main() -> None:
    """Compare and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/images.json"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="length of each run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "device": platform.machine(),
        "threads": 1,
    }
    if decoding._simplejpeg is not None:
        setting["simplejpeg"] = importlib.metadata.version("simplejpeg")
    results = [row for case in CASES for row in compare(case, arguments.runs, arguments.seconds)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps([row | setting for row in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
