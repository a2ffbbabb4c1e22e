"""Show where the time of a training step goes: CPU time per kind of operation, and the speed of matrix products.

python benchmarks/lm_profile.py  # Pythia-70M, batch 8 x 512, fp32
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from lm import PYTHIA_70M, TINY, flops, write_rows
from lm_contenders import Run, loop, products_per_second, transformers_model
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from rewurst.modules import CausalLM

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmm_", "mkl", "mkldnn"),
    "attention": ("_flash_attention", "_efficient_attention", "_fused_sdp", "_scaled_dot"),
    "softmax and loss": ("exp", "amax", "sum", "gather", "scatter", "log", "nll_loss", "softmax", "sub"),
    "activation": ("gelu",),
    "norms of layers": ("layer_norm",),
    "optimizer": ("_fused_adamw",),
    "clipping": ("foreach", "linalg_vector_norm"),
    "element by element": ("add", "mul", "neg", "div", "fill", "zero"),
    "copies": ("copy_", "cat", "clone", "index"),
    "embedding": ("embedding",),
}


def kind_of(name: str) -> str:
    """Return the first kind with a word that is in the operation's name."""
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "everything else")


def main() -> None:
    """Profile two steps of ours and of the raw loop, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = TINY if arguments.tiny else PYTHIA_70M
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows", shape, 3 * shape["rows"])
        for name in ("ours", "raw loop"):
            run = Run(**shape, warm=1, steps=2, folder=rows)
            torch.manual_seed(0)
            before = products_per_second("cpu")
            model, loss_of = contender(name, run)
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                loop(run, model, loss_of)
            seconds = sum(run.seconds(0)) / 2
            print(f"{name}: {seconds:.2f} s per step; products alone {before / 1e9:.0f} GFLOP/s")
            print(f"  {flops(shape)[0] / seconds / 1e9:.0f} GFLOP/s in the step")
            kinds: Counter[str] = Counter()
            for event in profiled.key_averages():
                kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / 3
            for kind, spent in kinds.most_common():
                print(f"  {kind:20} {spent:7.3f} s, {spent / sum(kinds.values()):6.1%}")


def contender(name: str, run: Run) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a model and the loss function for a loop."""
    if name == "ours":
        module = CausalLM(run.config)
        return module, module.loss
    model = transformers_model(run)

    def loss_of(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return model, loss_of


if __name__ == "__main__":
    main()
