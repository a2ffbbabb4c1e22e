"""Compare `rewurst plan` with the memory that training takes, and print the table for large models.

    python benchmarks/memory.py measure            # writes benchmarks/results/memory.json
    python benchmarks/memory.py table              # prints the table of docs/memory.md

The measurement is the peak resident memory of a process over three steps in Lightning's order, above its memory after
training a tiny module. glibc is set to return blocks of a megabyte and more when they are freed
(MALLOC_MMAP_THRESHOLD_), so that tensors are measured. By default it keeps holes between them, which is measured, too
("as glibc does it").
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewurst.cli.lightning import parse
from rewurst.memory.command import Configured
from rewurst.modules.causal_lm import CausalLM
from rewurst.modules.networks import Prior, diffusion
from rewurst.modules.networks.base import build
from rewurst.modules.optimizers.choice import STAGES, make_optimizer

Result = dict[str, Any]
CONFIGS = Path(__file__).parents[1] / "configs"
TEXT = [f"--config={CONFIGS}/continual/{name}.yaml" for name in ("base", "models/pythia_70m", "ibrahim/pile")]
CPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.devices=1"]
LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 12}
LLAMA |= {"num_attention_heads": 8, "intermediate_size": 1408, "tie_word_embeddings": True}
MODEL = "--model.init_args."
DATA = "--data.init_args."


def text(rows: int, length: int, *more: str) -> list[str]:
    """Return a command line of `fit` for a language model."""
    sizes = [f"{DATA}micro_batch_size={rows}", f"{DATA}global_batch_size={rows}", f"{DATA}sequence_length={length}"]
    return [*TEXT, *CPU, *sizes, *more]


STAGE_C = [f"--config={CONFIGS}/wuerstchen/one_gpu/stage_c.yaml", *CPU]
STAGE_C += [f"{DATA}micro_batch_size=24", f"{DATA}global_batch_size=24", "--trainer.callbacks=null"]
CASES: dict[str, tuple[list[str], int | None]] = {
    "Pythia-70M, 8 x 512": (text(8, 512), None),
    "Llama, 12 layers of 512, 16 x 256, recomputed": (
        text(16, 256, f"{MODEL}model={json.dumps(LLAMA)}", f"{MODEL}activation_checkpointing=1"),
        None,
    ),
    "Stage C, small, 24 x 12 x 12": (STAGE_C, 512),
}
OPTIMIZERS = ("adamw", "adamw_8bit")
PYTHIA = [f"--config={CONFIGS}/continual/{name}.yaml" for name in ("base", "models/pythia_410m", "ibrahim/pile")]
WIDER = [f"{MODEL}model.hidden_size=2048", f"{MODEL}model.intermediate_size=8192"]
NEOX = [f"--config={CONFIGS}/continual/{name}.yaml" for name in ("base", "models/neox_10b", "ibrahim/10b_pile")]
RELEASED = [f"--config={CONFIGS}/wuerstchen/paper/stage_c.yaml", f"{MODEL}prior=released"]
LARGE = {
    "405M": (PYTHIA, None),
    "1.4B": ([*PYTHIA, *WIDER], None),
    "10B": (NEOX, None),
    "Stage C, released": (RELEASED, 512),
}


def planned(name: str, optimizer: str) -> int:
    """Return the planned bytes."""
    args, image_size = CASES[name]
    config = Configured(parse(["fit", *args, f"{MODEL}optimizer={optimizer}"]), image_size)
    return config.at(config.layout(1), config.micro_batch_size, config.recomputed).total


def measured(name: str, optimizer: str, glibc: bool) -> int:
    """Return the bytes that a separate process took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not glibc:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    command = [sys.executable, __file__, "train", name, optimizer]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return int(done.stdout.splitlines()[-1])


def train(name: str, optimizer: Any) -> None:
    """Train a case and print the peak."""
    args, _ = CASES[name]
    config = parse(["fit", *args])
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    tiny = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 300}
    tiny |= {"num_attention_heads": 2, "intermediate_size": 200}
    steps(*language_model(tiny, 2, 16, optimizer), 2)  # libraries loaded by the first step do not count
    steps(*prior({"preset": "tiny"}, 2, optimizer), 2)
    gc.collect()
    before = memory_line("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    rows = data["micro_batch_size"]
    if "prior" in model:
        steps(*prior(model["prior"], rows, optimizer), 3)
    else:
        every = model["activation_checkpointing"]
        made = language_model(model["model"], rows, data["sequence_length"], optimizer, activation_checkpointing=every)
        steps(*made, 3)
    print(memory_line("VmHWM") - before)


Made = tuple[nn.Module, Callable[[], Tensor], torch.optim.Optimizer]


def language_model(settings: Any, rows: int, length: int, optimizer: Any, **options: Any) -> Made:
    """Return CausalLM, its loss on random tokens and its optimizer."""
    module = CausalLM(settings, optimizer=optimizer, **options)
    vocabulary = module.model.config.vocab_size  # type: ignore[union-attr]
    loss = lambda: module.loss(torch.randint(vocabulary, (rows, length + 1)))  # type: ignore[arg-type]  # noqa: E731
    return module, loss, module.configure_optimizers()


def prior(settings: Any, count: int, optimizer: Any) -> Made:
    """Return Stage C's network, its loss on random latents of 512 pixels and text states, and its optimizer."""
    network = build(Prior, settings)

    def loss() -> Tensor:
        x, t = torch.randn(count, network.config["c_in"], 12, 12), torch.rand(count)
        noise, states = torch.randn_like(x), torch.randn(count, 77, network.config["c_cond"])
        errors = (network(diffusion.diffuse(x, t, noise), t, states).float() - noise).square()
        return (errors * diffusion.p2_weight(t)[:, None, None, None]).mean()

    return network, loss, make_optimizer(optimizer, STAGES, network)


def steps(module: nn.Module, loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, count: int) -> None:
    """Train in Lightning's order: gradients of the previous step exist during the forward pass."""
    for _ in range(count):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()


def memory_line(name: str) -> int:
    """Return a line of the process's status in bytes (Linux)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def measure(out: Path, names: Sequence[str]) -> None:
    """Measure cases and write the results; existing results of other cases are kept."""
    results = json.loads(out.read_text()) if out.exists() else []
    for name in names:
        for optimizer in OPTIMIZERS:
            ours = planned(name, optimizer)
            for glibc in (False, True):
                theirs = measured(name, optimizer, glibc)
                what = f"{name}, {optimizer}" + (", as glibc does it" if glibc else "")
                print(
                    f"{what}: planned {ours / 1e9:.3f} GB, measured {theirs / 1e9:.3f}, {ours / theirs:.3f}", flush=True
                )
                row = {"what": what, "peer": "measured", "ours": ours, "theirs": theirs, "ratio": ours / theirs}
                row |= {"unit": "bytes", "torch": torch.__version__, "device": platform.machine()}
                results = [other for other in results if other["what"] != what]
                results.append(row | {"date": time.strftime("%F")})
                out.write_text(json.dumps(results, indent=2) + "\n")


def table(names: Sequence[str]) -> None:
    """Print the plans of large models on 1, 8 and 64 devices of 80 GiB."""
    print("| | devices | optimizer | weights, gradients, states | activations, buffers | peak | fits | micro-batch |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        args, image_size = LARGE[name]
        for optimizer in OPTIMIZERS:
            config = Configured(parse(["fit", *args, f"{MODEL}optimizer={optimizer}"]), image_size, 80 * 2**30)
            for devices in (1, 8, 64):
                config.strategy = "auto" if devices == 1 else "rewurst.callbacks.FSDP"
                print(line(f"{name}, {config.micro_batch_size} at a time", optimizer, config, devices), flush=True)


def line(name: str, optimizer: str, config: Configured, devices: int) -> str:
    """Return a row of the table; the second of two numbers is with every block recomputed."""
    answers = config.answers(devices)
    fixed = answers[0].plan.parameters + answers[0].plan.gradients + answers[0].plan.states
    others = " / ".join(f"{(a.plan.total - fixed) / 1e9:.1f}" for a in answers)
    peak = " / ".join(f"{a.plan.total / 1e9:.1f}" for a in answers)
    fits = " / ".join("yes" if a.plan.fits(config.memory) else "no" for a in answers)
    largest = " / ".join(str(a.largest) for a in answers)
    return f"| {name} | {devices} | `{optimizer}` | {fixed / 1e9:.1f} GB | {others} | {peak} | {fits} | {largest} |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("names", nargs="*", default=list(CASES))
    measuring.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "memory.json")
    commands.add_parser("table").add_argument("models", nargs="*", default=list(LARGE))
    training = commands.add_parser("train")
    training.add_argument("name")
    training.add_argument("optimizer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "measure":
        measure(arguments.out, arguments.names)
    elif arguments.command == "table":
        table(arguments.models)
    else:
        train(arguments.name, arguments.optimizer)


if __name__ == "__main__":
    main()
