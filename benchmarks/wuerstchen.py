"""Compare speed and memory of sampling Stage C and Stage B with diffusers on the same weights.

Both run the same loop with the same noise, in turns, in one process, and must draw the same latents. Times are medians.
Memory is the peak of a separate process for each side. Text encoders and Stage A are left out.

    python benchmarks/wuerstchen.py --out benchmarks/results/wuerstchen.json
    python benchmarks/wuerstchen.py --device cuda --dtype bfloat16 --suite released --out ...
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenDiffNeXt, WuerstchenPrior
from torch import Tensor, nn

from rewurst.modules.networks import ConditionCache, Network, Prior, StageBUNet, diffusion


@dataclass(frozen=True)
class Case:
    """One sampling run of one network.

    Attributes:
        what: Name in the results.
        network: Stage B or Stage C.
        config: Changes to the released arguments.
        size: Height and width of the latents that are sampled.
        steps: Number of sampling steps.
        guidance: Guidance scale; 0 for none.
    """

    what: str
    network: type[Network]
    size: int
    steps: int
    guidance: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)


FEW = {"blocks": [1, 1, 2, 1]}
SHALLOW = {"depth": 4}
CASES = [
    Case("Stage C sampling 24x24", Prior, 24, 5, 4.0, SHALLOW),
    Case("Stage C sampling 12x12", Prior, 12, 5, 4.0, SHALLOW),
    Case("Stage B sampling", StageBUNet, 128, 3, 0.0, FEW),
]
RELEASED = [
    Case("Stage C sampling 24x24", Prior, 24, 60, 4.0),
    Case("Stage C sampling 12x12", Prior, 12, 60, 4.0),
    Case("Stage B sampling", StageBUNet, 256, 12),
]
TINY_B = {"c_cond": 32, "c_hidden": [32, 64], "nhead": [-1, 4], "blocks": [1, 1], "clip_embd": 32}
TINY_B |= {"level_config": ["CT", "CTA"], "inject_effnet": [False, True]}
TINY_C = {"c": 64, "depth": 2, "nhead": 4, "c_cond": 32}
TINY = [
    Case("Stage C sampling 24x24", Prior, 24, 2, 4.0, TINY_C),
    Case("Stage C sampling 12x12", Prior, 12, 2, 4.0, TINY_C),
    Case("Stage B sampling", StageBUNet, 16, 2, 0.0, TINY_B),
]
SUITES = {"default": CASES, "released": RELEASED, "tiny": TINY}


def build(case: Case, device: str, dtype: torch.dtype) -> Network:
    """Return our network with a nonzero output; that of a fresh one is zero."""
    torch.manual_seed(0)
    with torch.device(device):
        network = case.network.from_preset("released", **case.config)
    nn.init.normal_(network.get_parameter("out.1.weight" if case.network is Prior else "clf.1.weight"), std=1e-3)
    return network.to(dtype).eval()


def twin(network: Network) -> nn.Module:
    """Return diffusers' network on the same tensors."""
    theirs = WuerstchenPrior if isinstance(network, Prior) else WuerstchenDiffNeXt
    with torch.device("meta"):
        other: nn.Module = theirs(**network.config)
    other.load_state_dict(network.state_dict(), assign=True)
    return other.eval()


def inputs(case: Case, network: Network, device: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return noise and conditions: two texts with guidance; for Stage B the compressor's latents before the text."""
    generator = torch.Generator().manual_seed(1)
    config = network.config
    noise = torch.randn(1, config["c_in"], case.size, case.size, generator=generator)
    width = config["c_cond"] if case.network is Prior else config["clip_embd"]
    conditions = [torch.randn(2 if case.guidance > 1 else 1, 77, width, generator=generator)]
    if case.network is StageBUNet:
        latents = max(1, round(case.size / 10.67))
        conditions.insert(0, torch.randn(1, config["effnet_embd"], latents, latents, generator=generator))
    return noise.to(device, dtype), [condition.to(device, dtype) for condition in conditions]


def sample_ours(network: nn.Module, case: Case, noise: Tensor, conditions: Sequence[Tensor]) -> Tensor:
    """Sample as ``TextToImage`` does."""
    cache: ConditionCache = {}

    def predict(x: Tensor, t: Tensor) -> Tensor:
        eps: Tensor = network(x, t, *conditions, cache)
        return diffusion.guide(eps, case.guidance) if case.guidance > 1 else eps

    generator = torch.Generator().manual_seed(2)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    return diffusion.sample(predict, x, diffusion.timesteps(case.steps), generator)


def sample_theirs(network: nn.Module, case: Case, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
    """Sample as diffusers' pipelines do, only the loop."""
    scheduler: Any = DDPMWuerstchenScheduler()
    generator = torch.Generator().manual_seed(2)
    scheduler.set_timesteps(case.steps, device=x.device)
    for t in scheduler.timesteps[:-1]:
        ratio = t.expand(1).to(x.dtype)
        if case.guidance > 1:
            wanted, unwanted = network(torch.cat([x] * 2), torch.cat([ratio] * 2), *conditions).chunk(2)
            noise = torch.lerp(unwanted, wanted, case.guidance)
        else:
            noise = network(x, ratio, *conditions)
        x = scheduler.step(noise, ratio, x, generator=generator).prev_sample
    return x


def timed(run: Callable[[], Tensor]) -> float:
    """Return the seconds of a run."""
    start = time.perf_counter()
    run().sum().item()  # waits for the device
    return time.perf_counter() - start


@torch.inference_mode()
def speed(case: Case, runs: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Time both in turns, after one run each that is checked but not timed."""
    ours = build(case, device, dtype)
    theirs = twin(ours)
    noise, conditions = inputs(case, ours, device, dtype)
    sides = [
        lambda: sample_ours(ours, case, noise, conditions),
        lambda: sample_theirs(theirs, case, noise, conditions),
    ]
    drawn = [side().float() for side in sides]
    difference = ((drawn[0] - drawn[1]).norm() / drawn[1].norm()).item()
    if dtype == torch.float32 and not difference < 1e-3:
        raise SystemExit(f"{case.what}: the latents have a relative difference of {difference}")
    seconds: list[list[float]] = [[], []]
    for run in range(runs):
        for side in (0, 1) if run % 2 == 0 else (1, 0):
            seconds[side].append(timed(sides[side]))
    medians = [statistics.median(times) for times in seconds]
    return {
        "what": case.what,
        "peer": "diffusers",
        "ours": 1 / medians[0],
        "theirs": 1 / medians[1],
        "ratio": medians[1] / medians[0],
        "unit": "images/s",
        "seconds_ours": seconds[0],
        "seconds_theirs": seconds[1],
        "relative_difference": difference,
    }


@torch.inference_mode()
def peak(case: Case, side: str, device: str, dtype: torch.dtype) -> dict[str, int]:
    """Sample once; return the process's peak memory, in total and above that of weights and libraries."""
    network: nn.Module = build(case, device, dtype)
    if side == "theirs":
        assert isinstance(network, Network)
        noise, conditions = inputs(case, network, device, dtype)
        network = twin(network)
    else:
        assert isinstance(network, Network)
        noise, conditions = inputs(case, network, device, dtype)
    before = reset_peak(noise.is_cuda)
    (sample_ours if side == "ours" else sample_theirs)(network, case, noise, conditions)
    after = peak_bytes(noise.is_cuda)
    return {"peak": after, "sampling": after - before}


def reset_peak(on_gpu: bool) -> int:
    """Reset the peak after building the network and return the current memory in bytes."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    return peak_bytes(on_gpu)


def peak_bytes(on_gpu: bool) -> int:
    """Return the peak since the last reset; getrusage would start at the parent's memory at the fork."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def memory(index: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the medians of each side in separate processes, in turns."""
    case = SUITES[arguments.suite][index]
    command = [sys.executable, __file__, "--suite", arguments.suite, "--device", arguments.device]
    command += ["--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    found: dict[str, list[dict[str, int]]] = {"ours": [], "theirs": []}
    for _ in range(arguments.runs):
        for side, peaks in found.items():
            done = subprocess.run([*command, "--peak", str(index), side], check=True, stdout=subprocess.PIPE, text=True)
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = (statistics.median(run["peak"] for run in peaks) for peaks in found.values())
    return {
        "what": case.what,
        "peer": "diffusers",
        "ours": ours,
        "theirs": theirs,
        "ratio": ours / theirs,
        "unit": "bytes",
        "peaks_ours": [run["peak"] for run in found["ours"]],
        "peaks_theirs": [run["peak"] for run in found["theirs"]],
        "sampling_ours": statistics.median(run["sampling"] for run in found["ours"]),
        "sampling_theirs": statistics.median(run["sampling"] for run in found["theirs"]),
    }


def main(args: Sequence[str] | None = None) -> None:
    """Run all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/wuerstchen.json"))
    parser.add_argument("--suite", choices=SUITES, default="default", help="released: full size, for a GPU")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(args)
    torch.set_num_threads(arguments.threads)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    cases = SUITES[arguments.suite]
    if arguments.peak:
        index, side = arguments.peak
        print(json.dumps(peak(cases[int(index)], side, arguments.device, dtype)))
        return
    setting = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "suite": arguments.suite,
        "runs": arguments.runs,
    }
    results = []
    for index, case in enumerate(cases):
        for row in (speed(case, arguments.runs, arguments.device, dtype), memory(index, arguments)):
            print(f"{row['what']}, {row['unit']}: {row['ours']:.4g} and {row['theirs']:.4g}, ratio {row['ratio']:.3f}")
            results.append(row | setting)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
