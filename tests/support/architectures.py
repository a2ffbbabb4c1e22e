"""Train, save, resume, export and reload published models for one step, and write the results to a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from published_configs import PUBLISHED

from rewurst import UsageError
from rewurst.modules import CausalLM
from rewurst.modules.language.building import rebuild
from rewurst.modules.language.hugging_face import export_hugging_face
from rewurst.modules.language.initial_weights import fill, lightning_state


class Row(NamedTuple):
    """Abilities of a model: empty if a test passes, else the reason in one line."""

    name: str
    model_type: str
    head: str
    terms: str
    documents: str


def build(name: str) -> CausalLM:
    """Return a tiny model in float64, with experts computed one by one: their grouped product has no float64."""
    torch.manual_seed(0)
    return _exact(CausalLM(PUBLISHED[name]))


def _exact(module: CausalLM) -> CausalLM:
    model: Any = module.model
    model.set_experts_implementation("eager")
    return module if model.config.model_type == "xglm" else module.double()  # its mask is too small for float64


def transformers_loss(module: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the model's own loss of the tokens that training predicts, including all terms."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    model: Any = module.model
    inputs = ids[:, :-1]

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
        result: torch.Tensor = ForCausalLMLoss(logits, None, vocab_size, shift_labels=ids[:, 1:].contiguous())
        return result

    model.loss_function = loss
    routed = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    try:
        found: torch.Tensor = model(input_ids=inputs, labels=inputs, use_cache=False, **routed).loss
    finally:
        del model.__dict__["_loss_function"]
    return found


def save(module: CausalLM, path: Path, tokenizer: Path) -> None:
    """Write a model as a checkpoint of a run does."""
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    data = {"tokenizer": str(tokenizer), "end_token": 0, "begin_tokens": []}
    torch.save({**checkpoint, "TextDataModule": data}, path)


def resume(path: Path) -> CausalLM:
    """Return the model of a checkpoint."""
    content = torch.load(path, weights_only=True)
    module = _exact(CausalLM(content["model_config"]))
    fill(module.model, lightning_state(content, path), str(path))
    return module


def export(module: CausalLM, folder: Path, tokenizer: Path, ids: torch.Tensor) -> None:
    """Export a model, with its logits next to the folder for the process that reloads it."""
    save(module.float(), folder.with_suffix(".ckpt"), tokenizer)
    export_hugging_face(folder.with_suffix(".ckpt"), folder)
    model = rebuild(torch.load(folder.with_suffix(".ckpt"), weights_only=True)["model_config"])
    model.load_state_dict(module.model.state_dict())
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    torch.save({"ids": ids, "logits": logits}, folder.with_suffix(".pt"))


def row(name: str) -> Row:
    """Return the row of a model in the table."""
    objective = CausalLM(PUBLISHED[name])._find_objective()
    try:
        CausalLM(PUBLISHED[name], document_masks=True)
        documents = "yes"
    except UsageError as error:
        documents = "no position_ids" if "position_ids" in str(error) else "refused: documents see one another"
    head = "in chunks" if objective.plain_head else "all logits"
    terms = "balance of experts" if objective.arguments else "other" if objective.own_terms else ""
    return Row(name, PUBLISHED[name]["model_type"], head, terms, documents)


def table(rows: list[Row]) -> str:
    """Return the page with the table."""
    lines = [f"| {row.name} | `{row.model_type}` | {row.head} | {row.terms} | {row.documents} |" for row in rows]
    return "\n".join([HEADER, *lines, ""])


HEADER = """# Models that were tried

`CausalLM` takes any causal language model of transformers. Each model below is built from its published `config.json`
with small sizes and trained for a step. Its loss equals the one that transformers computes, with all terms, to 1e-6 in
float64. It is saved, resumed, exported, and reloaded in a fresh process with equal logits. Config, generation config
and tokenizer of the export name the same tokens.

- **Loss:** `in chunks` never holds the logits of all tokens. Models that scale or cap their logits need them all.
- **Further terms:** what the model's own loss adds to the loss of the tokens.
- **`document_masks`:** whether the documents of a row can be kept apart. The module finds out by running a few
  tokens, and refuses with one line if not. States of recurrent layers cross documents. Some models read no positions.

`tests/modules/language/test_architectures.py` writes this page with `REWURST_WRITE_DOCS=1`.

| Model | `model_type` | Loss | Further terms | `document_masks` |
|---|---|---|---|---|"""

RELOAD = """
import sys, warnings
from pathlib import Path
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
transformers.logging.set_verbosity_error()
for path in sorted(Path(sys.argv[1]).glob("*.pt")):
    folder, saved = path.with_suffix(""), torch.load(path, weights_only=True)
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"], (path, found)
    with torch.no_grad():
        logits = model.eval()(input_ids=saved["ids"], use_cache=False).logits
    assert torch.allclose(logits, saved["logits"], rtol=1e-5, atol=1e-6), (path, (logits - saved["logits"]).abs().max())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for config in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            assert getattr(config, name) == getattr(tokenizer, name), (path, type(config), name)
    assert tokenizer.eos_token_id == 0
    print("equal", path.stem)
"""


def describe(name: str) -> str:
    """Return a file name for a model."""
    return name.replace(" ", "-").replace(".", "_")
