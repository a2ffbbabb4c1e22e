"""Run one of the training loops that ``lm.py`` compares, each in its own process.

Each trains the same GPT-NeoX from the same weights on the same rows in the same order, with fused AdamW and clipping to
norm 1. It prints one line of JSON: seconds of each timed step, the losses, and the peak memory above that of the
libraries before the model was built.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from rewurst.callbacks import ExactResume, LRRewarming, WarmupCosine
from rewurst.datamodules import Corpus, TextDataModule
from rewurst.datamodules.corpora.tokens import TokenShards
from rewurst.datamodules.sampling.permutation import CorpusOrder
from rewurst.modules import CausalLM
from rewurst.modules.causal_lm import PAPERS


@dataclass
class Run:
    """Settings and measurements of a run.

    Attributes:
        layers: Layers of the model; ``width`` (hidden size), ``heads`` and ``vocabulary`` are also its own.
        length: Number of predicted tokens per row.
        rows: Number of rows per global batch.
        warm: Number of warm-up steps, which are not timed.
        steps: Number of timed steps.
        folder: Folder of the corpus.
        device: Device, ``cpu`` or ``cuda`` with products in bfloat16.
        options: Arguments of CausalLM, or of the loop.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int
    rows: int
    warm: int
    steps: int
    folder: str
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """Config of GPT-NeoX as in the Pythia suite."""
        sizes = {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": self.heads}
        sizes |= {"intermediate_size": 4 * self.width, "vocab_size": self.vocabulary}
        return {"model_type": "gpt_neox", "max_position_embeddings": max(2048, self.length), **sizes}

    def batches(self) -> Iterator[Tensor]:
        """Yield batches as our data module reads them, (rows, length + 1)."""
        shards = TokenShards(self.folder)
        order = CorpusOrder("train", len(shards), 0, "full")
        for step in range(self.warm + self.steps):
            counter = torch.arange(step * self.rows, (step + 1) * self.rows).numpy()
            yield torch.from_numpy(shards.read(order.row(counter))).long()

    def tick(self, loss: Tensor) -> None:
        """Record the end of a step. A GPU is synchronized only where timing begins and ends."""
        self.losses.append(loss.detach())
        if self.device == "cuda":
            if len(self.losses) not in (self.warm, self.warm + self.steps):
                return
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))

    def seconds(self, clock: int) -> list[float]:
        """Return the seconds of each timed step, or their mean on a GPU; clock 0 is wall time, 1 CPU time."""
        times = [reading[clock] for reading in self.times]
        if self.device == "cuda":
            return [(times[-1] - times[0]) / self.steps]
        return [b - a for a, b in zip(times[self.warm - 1 :], times[self.warm :], strict=False)]


def lightning(run: Run) -> None:
    """Train CausalLM in Lightning's Trainer with our callbacks and data module, as a user would."""

    class Tick(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            run.tick(outputs["loss"])

    total = run.warm + run.steps
    module = CausalLM(run.config, **run.options)
    data = TextDataModule("train", {"train": Corpus(run.folder)}, {"train": run.folder}, run.length, run.rows, run.rows)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            accelerator="gpu" if run.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if run.device == "cuda" else "32-true",
            max_steps=total,
            max_epochs=-1,
            limit_val_batches=0,
            logger=CSVLogger(folder),
            callbacks=[LRRewarming(WarmupCosine(3e-4, 3e-5), total), ExactResume(), Tick()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data)


def loop(run: Run, model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> None:
    """Train in a minimal loop."""
    optimizer = PAPERS.of("adamw")(model.parameters())
    cast: Any = torch.autocast("cuda", torch.bfloat16) if run.device == "cuda" else nullcontext()
    for ids in run.batches():
        with cast:
            loss = loss_of(ids.to(run.device, non_blocking=True))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.tick(loss)


def our_loop(run: Run) -> None:
    """Train with CausalLM's loss without Lightning; the difference is the cost of Lightning and callbacks."""
    module = CausalLM(run.config, **run.options).to(run.device)
    loop(run, module, module.loss)


def raw_loop(run: Run) -> None:
    """Train transformers' model in a loop like nanoGPT's: all logits, one cross-entropy."""
    model: Any = transformers_model(run).to(run.device)
    called = torch.compile(model) if run.options.get("compile") else model

    def loss_of(ids: Tensor) -> Tensor:
        logits = called(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    loop(run, model, loss_of)


def trainer(run: Run) -> None:
    """Train with transformers.Trainer's defaults except for fused AdamW, the order of rows and no output."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Timed(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.last = super().training_step(*args, **kwargs)
            return self.last

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            run.tick(timed.last)

    rows = [row[:-1] for batch in run.batches() for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=run.rows,
            max_steps=run.warm + run.steps,
            optim="adamw_torch_fused",
            learning_rate=3e-4,
            use_cpu=run.device == "cpu",
            bf16=run.device == "cuda",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        timed = Timed(transformers_model(run), arguments, train_dataset=data, callbacks=[Tick()])
        timed.train()


def litgpt(run: Run) -> None:
    """Train litgpt's own model with ``litgpt.pretrain.fit`` and the same weights, not compiled."""
    from lightning.fabric import Fabric
    from litgpt import GPT, Config, pretrain
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_gpt_neox

    total = run.warm + run.steps
    weights = transformers_model(run).state_dict()  # first, so that the seed gives all the same
    weights = {
        name.replace("lm_head", "embed_out"): weight for name, weight in weights.items()
    }  # transformers 4's name
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    sizes = {"n_layer": run.layers, "n_embd": run.width, "n_head": run.heads, "block_size": 2048}
    model = GPT(Config.from_name("pythia-70m", **sizes, padded_vocab_size=run.vocabulary))
    state: dict[str, Any] = {}
    copy_weights_gpt_neox(model.config, state, weights)
    model.load_state_dict(state, assign=True)
    del weights, state
    model.max_seq_length = run.length
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(PAPERS.of("adamw")(model.parameters()))
    rows = list(run.batches())
    tokens = total * run.rows * run.length
    train = TrainArgs(None, 1, run.rows, run.rows, 1, max_tokens=tokens, max_norm=1.0, min_lr=3e-5)
    losses, compute = [], pretrain.chunked_cross_entropy

    def kept(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        losses.append(compute(logits, targets, **options))
        return losses[-1]

    pretrain.chunked_cross_entropy = kept
    optimizer.register_step_post_hook(lambda *_: run.tick(losses.pop()))
    whole = {"model": model, "optimizer": optimizer, "iter_num": 0, "step_count": 0}
    evaluation = EvalArgs(interval=10**9, final_validation=False, max_iters=0)
    pretrain.validate = lambda *_, **__: torch.zeros(())  # would evaluate two batches before training
    pretrain.fit(fabric, 1, whole, rows, [], Path(run.folder), None, train, evaluation)


def transformers_model(run: Run) -> nn.Module:
    """Return the model that CausalLM builds, from the same seed."""
    from rewurst.modules.language.building import build

    return build(run.config).train()


CONTENDERS = {
    "ours": lightning,
    "our loop": our_loop,
    "raw loop": raw_loop,
    "transformers.Trainer": trainer,
    "litgpt": litgpt,
}


def memory_line(name: str) -> int:
    """Return a line of the process's status in bytes (Linux)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def products_per_second(device: str) -> float:
    """Return the FLOP/s of square matrix products, the best of five, as the machine's current peak."""
    dtype, size = (torch.bfloat16, 8192) if device == "cuda" else (torch.float32, 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def main() -> None:
    """Train as the command line says."""
    name, given, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    run = Run(**json.loads(given))
    from transformers import GPTNeoXForCausalLM, Trainer  # noqa: F401  # excludes libraries from the measurement

    torch.manual_seed(0)
    before = memory_line("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, which starts at the parent's memory
    CONTENDERS[name](run)
    peak = torch.cuda.max_memory_allocated() if run.device == "cuda" else memory_line("VmHWM") - before
    losses = torch.stack(run.losses).tolist()
    gemm = products_per_second(run.device)
    seen = {"gemm": gemm, "seconds": run.seconds(0), "cpu_seconds": run.seconds(1), "losses": losses, "peak": peak}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
