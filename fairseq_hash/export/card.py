"""The model card: what is in the folder, where it comes from, how to use it."""

from typing import Any

from fairseq_hash.export.config import Model
from fairseq_hash.export.tokens import Tokens


def model_card(name: str, model: Model, tokens: Tokens, facts: dict[str, Any]) -> str:
    """Return the text of README.md.

    `name` is the folder's; `facts` are those of the checkpoint, as `fairseq-hash checkpoint show --json` prints them.
    """
    config, sizes, made = model.config, facts["parameters"], facts["provenance"]
    trained_with = [f"{key} {made[key]}" for key in ("fairseq_hash", "commit", "torch", "date") if made.get(key)]
    rows = {
        "parameters": f"{sizes['total']:,}, of them {sizes['experts']:,} of experts",
        "layers": config["num_hidden_layers"],
        "width": f"{config['hidden_size']}, of feed-forward networks {config['intermediate_size']}",
        "heads": config["num_attention_heads"],
        "sparse layers": _sparse(model),
        "positions": f"{config['max_position_embeddings']} ({config['positions']})",
        "symbols": f"{config['vocab_size']:,} ({'words' if tokens.pieces is None else 'SentencePiece'})",
        "updates": facts["update"],
        "dictionary": facts["dictionary_fingerprint"] or "not known",
        "hash table": facts["table_fingerprint"] or "none",
        "trained with": ", ".join(trained_with) or "not known",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return CARD.format(name=name, table=table, begin=tokens.begin, oracle=ORACLE if model.is_oracle else "")


def _sparse(model: Model) -> str:
    options = model.options
    if not options.is_sparse:
        return "none, a dense model"
    places = ", ".join(f"{place['layer']} ({place['router']})" for place in model.config["sparse_layers"])
    form = f"{options.num_experts} experts each, {options.sparse_placement}, {options.expert_form}"
    hashed = f"; hashed: {options.feature}, {options.experts_per_token} a token" if "hash" in options.routers else ""
    return f"{places}; {form}{hashed}"


ORACLE = """
**An oracle.** Its hash tables look at the token that it is to predict: its perplexity is none of a language model, and
it cannot generate.
"""
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [fairseq_hash, mixture-of-experts]
---

# {name}

A Transformer language model, trained with [fairseq](https://github.com/facebookresearch/fairseq) and fairseq_hash.
`fairseq-hash export` wrote this folder. No perplexity is claimed here: it depends on the text and on how it is cut.
{oracle}
| what | value |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("The old man", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0], skip_special_tokens=True))
```

`trust_remote_code` runs the two Python files of this folder: read them. Every sample of the training began with
`{begin}`, so a prompt should, too: the tokenizer puts it in front unless `add_special_tokens=False`. `</s>` is the end
of a line of the training's text.

```
lm_eval --model hf --model_args pretrained={name},trust_remote_code=True,add_bos_token=True --tasks TASK
```
"""
