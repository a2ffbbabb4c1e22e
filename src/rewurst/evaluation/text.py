"""How good an exported language model is: benchmark tasks through lm-eval, and its perplexity on corpora."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import UsageError
from ..datamodules.corpora.tokens import TokenShards
from ..datamodules.sampling.micro_batches import EvaluationRows, as_is
from ..datamodules.text import TokenReader
from ..hints import closest
from ..modules.causal_lm import CausalLM
from ..modules.language.limits import require_positions_for
from ..tokenizer_files import load_tokenizer
from ..tokenizer_meaning import same_tokenizer

Scores = dict[str, dict[str, Any]]


def evaluate_tasks(
    folder: str,
    tasks: Sequence[str],
    *,
    task_folder: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
) -> Scores:
    """Run tasks of EleutherAI's lm-eval on a Hugging Face folder.

    Tasks bring their data from the hub, or from local files where their YAML says so. A task is a program: a YAML in
    ``task_folder`` may call functions of Python files beside it.

    Args:
        folder: Hugging Face folder or hub name.
        tasks: Names, groups included.
        task_folder: Folder with more tasks, in lm-eval's format.
        num_fewshot: Examples before each question, by default the task's own number.
        limit: Questions of each task, by default all; for trying.
        batch_size: Questions at once.
        device: Such as "cuda".
        dtype: Of the weights.

    Returns:
        By task its metrics, each ``<metric>`` or ``<metric>/<filter>``, with ``<metric>_stderr``, and ``samples`` and
        ``version``.

    Raises:
        UsageError: lm-eval is not installed, or there is no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"tasks need lm-eval ({error}): pip install 'rewurst[eval]'") from None
    known = TaskManager(include_path=task_folder)
    for task in tasks:
        if not known.match_tasks([task]):
            raise UsageError(f"tasks: lm-eval has no {task!r}{closest(task, known.all_tasks)}")
    if not Path(folder).is_dir() and Path(folder).is_absolute():
        raise UsageError(f"{folder} is no folder: give an export of `rewurst export hf`, or a hub name")
    begin = bool(load_tokenizer(folder).begin_tokens) if Path(folder).is_dir() else None
    options: dict[str, Any] = {"batch_size": batch_size, "trust_remote_code": False, "add_bos_token": begin}
    model = HFLM(pretrained=folder, device=device, dtype=dtype, **options)
    found = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=known, num_fewshot=num_fewshot, limit=limit, log_samples=False
    )
    assert found is not None, "lm-eval gives results to the first process"
    return {task: _scores(metrics, found) for task, metrics in found["results"].items()}


def _scores(metrics: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    task = metrics.get("name", metrics["alias"])
    scores = {
        name.replace(",none", "").replace(",", "/"): value
        for name, value in metrics.items()
        if "," in name and isinstance(value, (int, float))
    }
    samples = found["n-samples"].get(task, {}).get("effective")
    return scores | {"samples": samples, "version": found["versions"].get(task)}


def evaluate_corpora(
    folder: str, corpora: Mapping[str, str], batch_size: int = 8, device: str = "cpu", dtype: str = "float32"
) -> Scores:
    """Mean loss a token, in nats, and perplexity of a language model on prepared corpora.

    Args:
        folder: Hugging Face folder or hub name.
        corpora: Folders of ``rewurst prepare text``, by name.
        batch_size: Rows at once.
        device: Such as "cuda".
        dtype: Of the weights.

    Returns:
        By corpus its ``loss``, ``perplexity`` and ``tokens``.

    Raises:
        UsageError: No model or corpus there, or the corpus was prepared with another tokenizer.
    """
    module = CausalLM(folder).to(device, getattr(torch, dtype)).eval()
    found = {}
    for name, path in corpora.items():
        shards = TokenShards(path)
        _check_tokenizer(folder, shards, module)
        require_positions_for(module.model, shards.index.sequence_length, f"the sequence_length of {path}")
        rows = EvaluationRows(shards, TokenReader([shards]), batch_size)
        loader = DataLoader(rows, batch_size=None, collate_fn=as_is)  # type: ignore[arg-type]
        total, tokens = 0.0, 0
        for batch in tqdm(loader, desc=name, unit=" batches"):
            with torch.inference_mode():
                batch = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
                mask = batch.get("mask", torch.ones_like(batch["input_ids"], dtype=torch.bool))
                losses = module.token_losses(batch["input_ids"].long(), mask)[batch["valid"]]
            total, tokens = total + float(losses.double().sum()), tokens + int(mask[batch["valid"]][:, 1:].sum())
        found[name] = {"loss": total / tokens, "perplexity": math.exp(min(total / tokens, 700)), "tokens": tokens}
    return found


def _check_tokenizer(folder: str, shards: TokenShards, module: CausalLM) -> None:
    """The same text must be the same numbers: a loss over other numbers means nothing."""
    known = module.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if shards.index.vocab_size > known:
        raise UsageError(
            f"{shards.path} has {shards.index.vocab_size} tokens, {folder} knows {known}: another tokenizer"
        )
    ours = Path(folder) / "tokenizer.json"
    if not ours.is_file():
        return
    try:
        theirs = shards.read_tokenizer()
    except FileNotFoundError:
        return
    if not same_tokenizer(theirs, ours.read_text(encoding="utf-8")):
        raise UsageError(f"{shards.path} was prepared with another tokenizer than that of {folder}: prepare it again")
    begin = load_tokenizer(folder).begin_tokens
    if begin != shards.index.begin_tokens:
        rank_zero_warn(
            f"{shards.path} has documents that begin with tokens {list(shards.index.begin_tokens)}, the tokenizer of "
            f"{folder} begins texts with {list(begin)}: prepare the corpus again with it"
        )
