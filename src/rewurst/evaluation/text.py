"""Evaluate an exported language model: benchmark tasks with lm-eval, and perplexity on corpora."""

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

    Tasks load their data from the hub, or from local files if their YAML says so. A task is a program: a YAML in
    ``task_folder`` may call functions of Python files next to it.

    Args:
        folder: Hugging Face folder or hub name.
        tasks: Names of tasks or groups.
        task_folder: Folder with more tasks, in lm-eval's format.
        num_fewshot: Number of examples before each question; the task's own by default.
        limit: Number of questions per task, for quick tries; all by default.
        batch_size: Number of questions at a time.
        device: Device to run on, such as "cuda".
        dtype: Data type of the weights.

    Returns:
        Metrics by task, each ``<metric>`` or ``<metric>/<filter>`` with ``<metric>_stderr``, and ``samples`` and
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
        raise UsageError(f"{folder} is not a folder: give an export of `rewurst export hf`, or a hub name")
    begin = bool(load_tokenizer(folder).begin_tokens) if Path(folder).is_dir() else None
    options: dict[str, Any] = {"batch_size": batch_size, "trust_remote_code": False, "add_bos_token": begin}
    model = HFLM(pretrained=folder, device=device, dtype=dtype, **options)
    found = simple_evaluate(
        model=model, tasks=list(tasks), task_manager=known, num_fewshot=num_fewshot, limit=limit, log_samples=False
    )
    assert found is not None, "lm-eval returns results only in the first process"
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
    """Return the mean loss per token, in nats, and the perplexity of a language model on prepared corpora.

    Args:
        folder: Hugging Face folder or hub name.
        corpora: Folders of ``rewurst prepare text``, by name.
        batch_size: Number of rows at a time.
        device: Device to run on, such as "cuda".
        dtype: Data type of the weights.

    Returns:
        ``loss``, ``perplexity`` and ``tokens`` by corpus.

    Raises:
        UsageError: A model or corpus is missing, or a corpus was prepared with another tokenizer.
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
    """Refuse a corpus with another tokenizer: losses over other token numbers are meaningless."""
    known = module.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if shards.index.vocab_size > known:
        raise UsageError(
            f"{shards.path} has a vocabulary of {shards.index.vocab_size} and {folder} of {known}: another tokenizer"
        )
    ours = Path(folder) / "tokenizer.json"
    if not ours.is_file():
        return
    try:
        theirs = shards.read_tokenizer()
    except FileNotFoundError:
        return
    if not same_tokenizer(theirs, ours.read_text(encoding="utf-8")):
        raise UsageError(f"{shards.path} was not prepared with the tokenizer of {folder}: prepare it again")
    begin = load_tokenizer(folder).begin_tokens
    if begin != shards.index.begin_tokens:
        rank_zero_warn(
            f"documents of {shards.path} begin with tokens {list(shards.index.begin_tokens)}, but the tokenizer of "
            f"{folder} begins texts with {list(begin)}: prepare the corpus again with it"
        )
