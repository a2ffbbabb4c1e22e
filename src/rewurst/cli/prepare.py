"""Commands of ``rewurst prepare`` whose arguments differ from those of the functions behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .. import UsageError
from ..preparation.tokenizer import train_tokenizer


def tokenizer(
    sources: Sequence[str],
    out: Path,
    vocab_size: int,
    text_field: str = "text",
    max_corrupt: float = 0.05,
    overwrite: bool = False,
) -> str:
    """Train a byte-level BPE tokenizer.

    Args:
        sources: Text files (.txt, .md, .jsonl, .json, .csv, .tsv, also with .gz, .zst, .bz2 or .xz; .parquet, .arrow),
            .tar of captioned images, folders or URLs of them, builtin:prose or builtin:code.
        out: Folder to write, new or empty.
        vocab_size: Number of tokens, the end token and 256 bytes included.
        text_field: Field of .jsonl and .json, or column of a table, with the text; raw.text is a field in a field.
        max_corrupt: Share of the documents, and of the bytes in damaged files, that may be lost; they are skipped,
            counted and the first ones named.
        overwrite: Replace a tokenizer that is there.
    """
    size = train_tokenizer(
        sources, vocab_size, out, text_field=text_field, max_corrupt=max_corrupt, overwrite=overwrite
    )
    return f"{out}: a tokenizer of {size} tokens"


def index(
    shards: Sequence[str],
    out: Path | None = None,
    kind: Literal["text", "images"] | None = None,
    tokenizer: str | None = None,
    caption_key: str | None = None,
    image_member: str | None = None,
    caption_member: str | None = None,
    max_corrupt: float | None = None,
    sequence_length: int | None = None,
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> str:
    """Index existing tar shards of token rows or of images, or flat files of tokens, in one pass.

    Flat files are .bin and .idx of Megatron-LM or GPT-NeoX, .bin of nanoGPT or llm.c, and folders of LitData's chunks
    of tokens. They are read in place.

    Args:
        shards: Paths, globs, braces, folders or URLs of tars; paths or URLs of .bin files.
        out: Folder of the index (default: the folder of the tars); flat files need one.
        kind: Kind of corpus (default: what the first sample looks like).
        tokenizer: Folder or hub name of the tokenizer that made the rows of tokens.
        caption_key: Key of the .json that has the caption of an image (default: the .txt is the caption).
        image_member: Ending of the names of images, such as .input.jpg (default: .jpg, .png and others).
        caption_member: Ending of the names of captions, such as .output.txt (default: .txt, or .json with a key).
        max_corrupt: Share of the images that may be unreadable (default: 0.1).
        sequence_length: Number of predicted tokens per row of flat files.
        dtype: Type of the tokens in flat files that do not say it.
        workers: Number of processes that scan.
        overwrite: Replace an index that is there.
    """
    from ..preparation.flat_tokens import index_flat, is_flat
    from ..preparation.index import index_shards

    if all(map(is_flat, shards)):
        if sequence_length is None or out is None:
            raise UsageError(
                "flat files of tokens need --sequence_length, the tokens per row, and --out for their index"
            )
        return index_flat(shards, out, sequence_length, dtype=dtype, tokenizer=tokenizer, overwrite=overwrite)
    if sequence_length is not None or dtype is not None:
        raise UsageError("--sequence_length and --dtype are for flat files of tokens (.bin); tars say both themselves")
    given = {"tokenizer": tokenizer, "caption_key": caption_key, "max_corrupt": max_corrupt}
    given |= {"image_member": image_member, "caption_member": caption_member}
    options = {name: value for name, value in given.items() if value is not None}
    return index_shards(shards, out, kind=kind, workers=workers, overwrite=overwrite, options=options)


def verify(folder: Path) -> str:
    """Compare every byte of a folder's shards with its index.

    Args:
        folder: Folder with index.json, or with such folders.
    """
    from ..preparation.verify import verify as problems_of

    problems = problems_of(folder)
    for problem in problems:
        print(problem)
    if problems:
        raise UsageError(f"{folder}: {len(problems)} problems; prepare it again")
    return f"{folder}: every shard is as its index says"
