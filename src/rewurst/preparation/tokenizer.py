"""Tokenizers: byte-level BPE trained on sources, and any fast tokenizer of a folder or the hub read for encoding."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from .. import UsageError
from ..files import write_atomically, writing
from .sources.documents import read
from .sources.skipped import Skipped
from .sources.source_files import expand, total_bytes
from .writing.folders import TOKENIZER_LAYOUT, make_folder

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # all bytes and the end token


def train_tokenizer(
    sources: Sequence[str],
    vocab_size: int,
    out: Path,
    *,
    text_field: str = "text",
    max_corrupt: float = 0.05,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Train a byte-level BPE and save it so that ``AutoTokenizer.from_pretrained(out)`` loads it.

    Token 0 is ``<|endoftext|>`` (end, beginning and unknown token); all 256 bytes are tokens, so that any text can be
    encoded and decoded again. The same sources give the same bytes.

    Returns:
        The vocabulary reached: less than ``vocab_size`` where the text has too few pairs to merge.

    Raises:
        UsageError: A vocabulary under 257, sources that cannot be read, an ``out`` that is not empty.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"vocab_size is {vocab_size}, expected {SMALLEST_VOCABULARY} or more: 256 bytes and the end token"
        )
    skipped = Skipped(max_corrupt)
    files = expand(sources, skipped)
    make_folder(Path(out), TOKENIZER_LAYOUT, overwrite)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with tqdm(unit=" characters", unit_scale=True, desc="tokenizer", disable=not progress, file=sys.stderr) as bar:

        def texts() -> Iterator[str]:
            for file in files:
                for piece in read(file, text_field, skipped):
                    bar.update(len(piece.text))
                    yield piece.text

        tokenizer.train_from_iterator(texts(), trainer)
    skipped.check(total_bytes(files), final=True)
    _save(tokenizer, Path(out))
    reached = int(tokenizer.get_vocab_size())
    few = f" ({vocab_size} asked for; the text has no more pairs to merge)" if reached < vocab_size else ""
    print("; ".join(filter(None, [f"{out}: {reached} tokens{few}", skipped.report()])), file=sys.stderr)
    return reached


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,  # decoding gives back what was encoded
    }
    with writing(folder):
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
