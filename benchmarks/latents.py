"""Compare Stage C's training with diffusers' prior, and its data from cached latents with pixels.

Data is measured in images per second delivered to the prior, without its own step, in one process without workers. One
side decodes JPEGs of 512 pixels and runs an EfficientNetV2-S compressor and a text encoder like the released one, with
``--text_layers`` layers and random weights. The other reads the latents and text states of ``rewurst prepare latents``.

    python benchmarks/latents.py --out benchmarks/results/wuerstchen.json     # replaces its own rows there
"""

import argparse
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor, nn
from wuerstchen import peak_bytes, reset_peak, twin

from rewurst.datamodules import Corpus, ImageTextDataModule, LatentDataModule
from rewurst.datamodules.sampling.micro_batches import SampleIndices
from rewurst.modules import StageC
from rewurst.modules.networks import Prior, SemanticCompressor, diffusion
from rewurst.preparation.index import index_shards
from rewurst.preparation.latents import prepare_latents

WIDTH = 1280  # width of the released text encoder
STEP, DATA = "Stage C training step 24x24", "images delivered to the prior"


def median_seconds(sides: Sequence[Callable[[], object]], runs: int) -> list[list[float]]:
    """Time sides in turns, after one warm-up run each."""
    for side in sides:
        side()
    seconds: list[list[float]] = [[] for _ in sides]
    for run in range(runs):
        for side in range(len(sides)) if run % 2 == 0 else reversed(range(len(sides))):
            start = time.perf_counter()
            sides[side]()
            seconds[side].append(time.perf_counter() - start)
    return seconds


def row(what: str, peer: str, seconds: Sequence[Sequence[float]], images: int) -> dict[str, Any]:
    """Return a row of results, ours first."""
    ours, theirs = (images / statistics.median(times) for times in seconds)
    found = {"what": what, "peer": peer, "ours": ours, "theirs": theirs, "ratio": ours / theirs, "unit": "images/s"}
    return found | {"seconds_ours": list(seconds[0]), "seconds_theirs": list(seconds[1])}


def training_step(network: nn.Module, ours: bool, batch: Sequence[Tensor]) -> Callable[[], float]:
    """Return a training step: forward, backward, clipping and AdamW; theirs in the plainest loop."""
    x, t, noise, text = batch
    network.train()
    decayed = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decayed, lr=1e-4, weight_decay=0.0, fused=True if ours else None)

    def step() -> float:
        noised = diffusion.diffuse(x, t, noise)
        error = (network(noised, t, text).float() - noise).square().mean((1, 2, 3))
        loss = (error * diffusion.p2_weight(t)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def compare_steps(runs: int, samples: int) -> dict[str, Any]:
    """Time a training step at c=1536, depth 2, 24 x 24; both start from equal weights and give equal losses."""
    sides = [build_step(side, samples) for side in ("ours", "theirs")]
    first, second = (side() for side in sides)
    if abs(first - second) > 1e-4 * abs(second):
        raise SystemExit(f"{STEP}: losses are {first} and {second}")
    return row(STEP, "diffusers", median_seconds(sides, runs), samples) | {"samples": samples}


def build_step(side: str, samples: int) -> Callable[[], float]:
    """Return a training step of our prior or diffusers', with the same weights and batch."""
    torch.manual_seed(0)
    network: nn.Module = Prior.from_preset("released", depth=2, dropout=0.0)
    nn.init.normal_(network.get_parameter("out.1.weight"), std=1e-3)
    x, noise = torch.randn(2, samples, 16, 24, 24)
    batch = (x, torch.linspace(0.1, 0.9, samples), noise, torch.randn(samples, 77, WIDTH))
    if side == "theirs":
        assert isinstance(network, Prior)
        network = twin(network)
    return training_step(network, side == "ours", batch)


def compare_memory(runs: int, samples: int, threads: int) -> dict[str, Any]:
    """Measure the peak memory of processes that train for two steps, including libraries and optimizer."""
    peaks: dict[str, list[int]] = {"ours": [], "theirs": []}
    for _ in range(runs):
        for side, found in peaks.items():
            command = [sys.executable, __file__, "--peak", side, "--samples", str(samples), "--threads", str(threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(int(done.stdout.split()[-1]))
    ours, theirs = (statistics.median(found) for found in peaks.values())
    found = {"what": STEP, "peer": "diffusers", "ours": ours, "theirs": theirs, "ratio": ours / theirs, "unit": "bytes"}
    return found | {"peaks_ours": peaks["ours"], "peaks_theirs": peaks["theirs"], "samples": samples}


def write_images(folder: Path, count: int) -> str:
    """Write smooth JPEGs of 512 pixels with captions."""
    folder.mkdir()
    with wds.ShardWriter(str(folder / "%05d.tar"), maxcount=1000, verbose=0) as writer:
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 256, (48, 48, 3)).astype(np.uint8)
            content = io.BytesIO()
            Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC).save(content, "jpeg", quality=90)
            caption = f"a photograph of number {number} on a table next to a window"
            writer.write({"__key__": f"{number:06d}", "jpg": content.getvalue(), "txt": caption})
    index_shards([str(folder)], progress=False)
    return str(folder)


def write_text_encoder(folder: Path, layers: int) -> str:
    """Write a CLIP text model with random weights and a byte-level tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokens = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 20,
        "num_hidden_layers": layers,
    }
    CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **size, **tokens)).save_pretrained(folder)
    vocab = {word: index for index, word in enumerate(words)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder)
    return str(folder)


def compare_data(root: Path, images: int, layers: int, runs: int, batch_size: int) -> dict[str, Any]:
    """Time batches up to the prior's inputs: x and text states."""
    source, clip = write_images(root / "images", images), write_text_encoder(root / "clip", layers)
    torch.manual_seed(0)
    SemanticCompressor.from_preset("released").save(root / "compressor")
    compressor, out = str(root / "compressor"), root / "latents"
    options: dict[str, Any] = {"what": ("z", "text"), "text_encoder": clip, "batch_size": batch_size}
    prepare_latents(source, out, compressor, 512, **options)
    module = StageC(compressor, {"preset": "released", "depth": 1}, clip).eval()
    shared: dict[str, Any] = {"micro_batch_size": batch_size, "global_batch_size": batch_size}
    pixels = ImageTextDataModule("d", {"a": Corpus(source)}, {}, 512, random_crop=False, **shared)
    latents = LatentDataModule("d", {"a": Corpus(str(out))}, {}, **shared)
    sides, given = [], []
    for data in (latents, pixels):
        path = data.corpora["a"].path
        reader = data.reader([data.open_corpus("a", path)])
        rows = np.arange(batch_size)
        picks = SampleIndices(np.zeros_like(rows), rows, rows, 0, training=True)

        def deliver(reader: Any = reader, picks: SampleIndices = picks) -> list[Tensor]:
            batch = reader(picks)
            with torch.no_grad():
                return [module.embeddings(batch), module.text_states(batch)]

        sides.append(deliver)
        given.append(deliver())
    difference = max(float((a - b).abs().max()) for a, b in zip(*given, strict=True))
    if difference > 1e-2:
        raise SystemExit(f"{DATA}: the two sides differ by {difference}")
    found = row(DATA, "pixels", median_seconds(sides, runs), batch_size)
    return found | {"text_layers": layers, "largest_difference": difference}


def main(args: Sequence[str] | None = None) -> None:
    """Run both comparisons and add their rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/wuerstchen.json"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2, help="samples per training step")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--text_layers", type=int, default=4, help="layers of the text encoder; the released one has 32"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(args)
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        step = build_step(arguments.peak, arguments.samples)
        reset_peak(on_gpu=False)
        for _ in range(2):  # the first makes the optimizer's state
            step()
        print(peak_bytes(on_gpu=False))
        return
    setting = {"torch": torch.__version__, "device": platform.machine(), "threads": arguments.threads}
    setting |= {"dtype": "float32", "runs": arguments.runs}
    results = [compare_steps(arguments.runs, arguments.samples)]
    results.append(compare_memory(arguments.runs, arguments.samples, arguments.threads))
    with tempfile.TemporaryDirectory() as root:
        sizes = (arguments.images, arguments.text_layers, arguments.runs, arguments.batch_size)
        results.append(compare_data(Path(root), *sizes))
    for found in results:
        ours, theirs, ratio = (found[name] for name in ("ours", "theirs", "ratio"))
        print(f"{found['what']}, {found['unit']}: {ours:.4g} and {theirs:.4g}, ratio {ratio:.3f}")
    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    kept = [one for one in kept if one["what"] not in (STEP, DATA)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(kept + [found | setting for found in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
