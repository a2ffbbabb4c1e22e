"""The index of a corpus of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from .. import UsageError
from .corpus_index import CorpusIndex
from .token_member import DTYPES


@dataclass(frozen=True, kw_only=True)
class TokenIndex(CorpusIndex):
    """The contents of ``index.json``; of each shard ``rows`` counts rows and ``samples`` tar members.

    Attributes:
        dtype: ``uint16`` for vocabularies of up to 65,536 tokens, else ``uint32``; foreign shards may have others.
        sequence_length: Predicted tokens a row; a row holds one token more.
        rows_per_sample: Rows of every tar member but the last one of a shard, which may hold fewer.
        tokens: Predicted tokens, ``rows * sequence_length``.
        documents: Documents in the stream, the dropped tail included; 0 where that is not known.
        dropped_tokens: Tokens at the end of the stream that fill no row.
        vocab_size: Every token is below it.
        end_token: The token after each document, none where that is not known.
        tokenizer_sha256: SHA-256 of the ``tokenizer.json`` that made the tokens, empty where that is not known.
    """

    dtype: str
    sequence_length: int
    rows_per_sample: int
    tokens: int
    documents: int
    dropped_tokens: int
    vocab_size: int
    end_token: int | None
    tokenizer_sha256: str
    kind: str = "text"

    def check(self, where: str) -> None:
        """Raise where the index at ``where`` contradicts itself."""
        super().check(where)
        if self.dtype not in DTYPES:
            raise UsageError(f"{where}: dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        expected = {
            "sequence_length": max(1, self.sequence_length),
            "rows_per_sample": max(1, self.rows_per_sample),
            "tokens": self.rows * self.sequence_length,
        }
        for name, right in expected.items():
            if (value := getattr(self, name)) != right:
                raise UsageError(f"{where}: {name} is {value}, expected {right}; prepare the corpus again")
        for shard in self.shards:
            if shard.samples != -(-shard.rows // self.rows_per_sample):
                raise UsageError(
                    f"{where}: {shard.name} has {shard.rows} rows in {shard.samples} members, expected "
                    f"{self.rows_per_sample} in each but the last; prepare the corpus again"
                )

    @classmethod
    def not_in_fingerprint(cls) -> tuple[str, ...]:
        """Counts that follow from the shards or decide nothing."""
        return ("tokens", "documents", "dropped_tokens")
