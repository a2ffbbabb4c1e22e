"""Compare 8-bit with 32-bit optimizers, and Muon with AdamW: losses after 200 steps, and bytes of states.

Each trains a small GPT-NeoX on prose (the language reference of the running Python) in one process, 8-bit AdamW also
with FSDP in two processes.

    python benchmarks/optimizers.py --out benchmarks/results/optimizers.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from rewurst.callbacks import FSDP, LRRewarming, WarmupCosine
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.modules import CausalLM
from rewurst.train import main as rewurst

STEPS, LAST = 200, 20
MODEL = {"model_type": "gpt_neox", "vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 4}
MODEL |= {"num_attention_heads": 4, "intermediate_size": 512, "max_position_embeddings": 128}
RUNS = [("adamw", 1), ("adamw_8bit", 1), ("adamw_8bit", 2), ("lion", 1), ("lion_8bit", 1), ("muon", 1)]
PEERS = {"adamw_8bit": "adamw", "lion_8bit": "lion", "muon": "adamw"}


class Losses(Callback):
    """Callback that records the mean loss of every global batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record the loss."""
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        self.losses.append(float(loss))


def train(folder: str, optimizer: Any, devices: int) -> None:
    """Train and print a line of JSON: the mean of the last losses, and bytes of states."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    module = CausalLM(MODEL, optimizer=optimizer)
    data = TextDataModule("prose", {"prose": Corpus(f"{folder}/prose/train")}, {}, 128, 16 // devices, 16)
    recorder, peak = Losses(), 2e-4 if optimizer.startswith("lion") else 2e-3
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=FSDP() if devices > 1 else "auto",
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[LRRewarming(WarmupCosine(peak, peak / 10, 0.02), STEPS), recorder],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    held, of_8_bits, elements = 0, 0, 0
    for parameter, state in trainer.optimizers[0].state.items():
        tensors = [value for value in state.values() if isinstance(value, Tensor) and value.ndim]
        held += sum(tensor.nbytes for tensor in tensors)
        if any(tensor.dtype == torch.uint8 for tensor in tensors):
            of_8_bits += sum(tensor.nbytes for tensor in tensors)
            elements += parameter.numel()
    if trainer.is_global_zero:
        end = sum(recorder.losses[-LAST:]) / LAST
        seen = {"first": recorder.losses[0], "end": end, "bytes": held, "bytes_8": of_8_bits, "elements_8": elements}
        print(json.dumps(seen))


def run(folder: str, optimizer: str, devices: int) -> dict[str, Any]:
    """Train in separate processes."""
    command = [sys.executable, __file__, "train", folder, optimizer, str(devices)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if devices > 1:
        command[1:2] = ["-m", "torch.distributed.run", f"--nproc_per_node={devices}", "--rdzv_backend=c10d"]
        command[5:5] = ["--rdzv_endpoint=127.0.0.1:0", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    result: dict[str, Any] = json.loads(line)
    return result


def main() -> None:
    """Run all and write the results, or train if the first argument says so."""
    if sys.argv[1:2] == ["train"]:
        train(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "optimizers.json")
    arguments = parser.parse_args()
    rows, whole = [], {}
    with tempfile.TemporaryDirectory() as folder:
        rewurst(["prepare", "tokenizer", "builtin:prose", "--vocab_size", "1024", "--out", f"{folder}/tokenizer"])
        text = ["--tokenizer", f"{folder}/tokenizer", "--sequence_length", "128", "--out", f"{folder}/prose"]
        rewurst(["prepare", "text", "builtin:prose", *text])
        for optimizer, devices in RUNS:
            found = run(folder, optimizer, devices)
            kind = PEERS.get(optimizer, optimizer)
            whole.setdefault(kind, found)
            what = f"{optimizer}, {devices} process{'es, FSDP' * (devices > 1)}"
            row = {"what": what, "peer": kind, "ours": found["end"], "theirs": whole[kind]["end"], "unit": "nats"}
            row |= {"ratio": found["end"] / whole[kind]["end"], "first": found["first"]}
            if devices == 1:
                row |= {"state_bytes": found["bytes"], "of_32_bits": found["bytes"] / whole[kind]["bytes"]}
            if devices == 1 and found["elements_8"]:
                moments = 2 if kind == "adamw" else 1
                row["of_32_bits_in_8_bits"] = found["bytes_8"] / (4 * moments * found["elements_8"])
            print(row, flush=True)
            rows.append(row | {"torch": torch.__version__, "device": platform.machine(), "date": time.strftime("%F")})
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
