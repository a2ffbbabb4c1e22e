"""Text to tokens in worker processes: in order, with a bounded number of tasks on their way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ... import UsageError
from ..sources.documents import Skipped, SourceFile, read

TASK_CHARS = 2**20
TASKS_PER_WORKER = 2  # one in work, one that waits, so that a worker never does


class Text(NamedTuple):
    """Part of a document, the number of the stream that it belongs to, and whether the document ends with it."""

    stream: int
    text: str
    ends_document: bool


def is_held_out(beginning: str, share: float) -> bool:
    """Whether a document that begins so (its first piece) is for validation; it depends on nothing else."""
    digest = hashlib.blake2b(beginning.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def texts(files: Iterable[SourceFile], text_field: str, held_out: float, skipped: Skipped) -> Iterator[Text]:
    """The documents of files; stream 1 is that of documents that are held out, stream 0 that of all others.

    Args:
        files: From ``sources.expand``; what a file gives depends on none before it.
        text_field: Field of JSON lines, column of Parquet files.
        held_out: Share of the documents that is held out.
        skipped: Counts what is left out.

    Raises:
        UsageError: What is wrong with a file, and where.
    """
    stream, begins = 0, True
    for file in files:
        for piece in read(file, text_field, skipped):
            if begins:
                stream = int(is_held_out(piece.text, held_out))
            yield Text(stream, piece.text, piece.ends_document)
            begins = piece.ends_document


class Tokens(NamedTuple):
    """Tokens for one stream, shape (n,), and the number of documents that end in them."""

    stream: int
    tokens: NDArray[Any]
    documents: int


class Encoder:
    """Encodes tasks with a tokenizer, an end token after each document.

    Args:
        tokenizer_json: Contents of ``tokenizer.json``.
        end_token: Number of the end token.
    """

    def __init__(self, tokenizer_json: str, end_token: int) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()  # a saved tokenizer may cut at the length of its model
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text, and ends no document
        self.end_token = end_token

    def __call__(self, task: list[Text]) -> list[Tokens]:
        """Encode ``task``: one result for each stream that it holds something for."""
        parts: dict[int, list[NDArray[Any]]] = {}
        documents: dict[int, int] = {}
        for text in task:
            stream = parts.setdefault(text.stream, [])
            # One text at a time: an encoding is a hundred times larger than its numbers.
            encoding = self.tokenizer.encode_batch_fast([text.text], add_special_tokens=False)[0]
            stream.append(np.array(encoding.ids, dtype=np.uint32))
            if text.ends_document:
                stream.append(np.array([self.end_token], dtype=np.uint32))
                documents[text.stream] = documents.get(text.stream, 0) + 1
        return [Tokens(number, np.concatenate(part), documents.get(number, 0)) for number, part in parts.items()]


def tasks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Group texts into lists of about ``TASK_CHARS`` characters, which do not depend on who encodes them."""
    task: list[Text] = []
    size = 0
    for text in texts:
        task.append(text)
        size += len(text.text) + 64  # a million empty lines are work too
        if size >= TASK_CHARS:
            yield task
            task, size = [], 0
    if task:
        yield task


def encode(texts: Iterable[Text], tokenizer_json: str, end_token: int, workers: int) -> Iterator[Tokens]:
    """Tokens of ``texts`` in their order, which is the same for any number of ``workers``.

    Args:
        texts: Read only as far as ``TASKS_PER_WORKER`` tasks a worker ahead of what has been returned.
        tokenizer_json: Contents of ``tokenizer.json``.
        end_token: Number of the end token.
        workers: Processes; with 0 or 1 the work is done in this one.

    Raises:
        UsageError: A worker died, as it does when the system runs out of memory.
    """
    if workers <= 1:
        encoder = Encoder(tokenizer_json, end_token)
        for task in tasks(texts):
            yield from encoder(task)
        return
    # Spawned, not forked: the parent may hold threads of torch and tokenizers, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_json, end_token))
    pending: deque[Future[list[Tokens]]] = deque()
    try:
        for task in tasks(texts):
            pending.append(pool.submit(_encode_in_worker, task))
            if len(pending) >= workers * TASKS_PER_WORKER:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UsageError(
            f"a tokenizing process died, perhaps for want of memory; try --workers below {workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # of this worker process


def start_worker() -> None:
    """To be called in processes that encode beside others."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism


def _start_worker(tokenizer_json: str, end_token: int) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    start_worker()
    _encoder = Encoder(tokenizer_json, end_token)


def _encode_in_worker(task: list[Text]) -> list[Tokens]:
    assert _encoder is not None
    return _encoder(task)
