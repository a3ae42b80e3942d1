"""What is in a checkpoint, by its main file and its shards' headers: no expert is read."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fairseq_hash.checkpoint.hash_tables import tables_of
from fairseq_hash.checkpoint.manifest import KEY, Manifest, expert_tensors
from fairseq_hash.core.fields import fits
from fairseq_hash.hashing.table import fingerprint_of_tables


def facts(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `show` prints, ready for JSON; None where a checkpoint does not say.

    `state` is what `read_checkpoint` returned for the main file at `path`.
    """
    model, manifest = state["model"], state["model"].manifest
    options = model_options(state)
    history = (state.get("optimizer_history") or [{}])[-1]
    names = expert_tensors(model, manifest)
    experts = {name: value for name, value in model.items() if name in names}
    ends = ("fc1_weight", "gate_up_weight")
    inwards = {name: value for name, value in experts.items() if name.endswith(ends) and len(value.shape) == 3}
    first_name, first = next(iter(inwards.items()), ("", None))
    kind = "sharded" if manifest is not None and manifest.shards else "plain" if experts else "dense"
    if manifest is None and KEY in state:
        kind = "experts of one rank"  # fully sharded data parallel
    shards = manifest.shards if manifest is not None else ()
    in_shards = {part: sum(shard.bytes for shard in shards if shard.part == part) for part in ("weights", "optimizer")}
    others = {name: value for name, value in model.items() if name not in names}
    sizes = {"dense": _count(others), "experts": _count(experts)}
    return {
        "file": str(path),
        "kind": kind,
        "update": manifest.update if manifest is not None else _of(history, "num_updates", int),
        "epoch": _of(_of(state.get("extra_state"), "train_iterator", dict), "epoch", int),
        "router": manifest.router if manifest is not None else _router(options),
        "experts": 0 if first is None else len(first),
        "sparse_layers": _sparse_layers(model),
        "model_width": first.shape[2] if first is not None else _of(options, "decoder_embed_dim", int),
        "expert_hidden_width": first.shape[1] // (1 + ("gate_up" in first_name)) if first is not None else None,
        "parameters": {"total": sum(sizes.values()), **sizes},
        "bytes": {"main_file": path.stat().st_size, **{f"{part}_shards": size for part, size in in_shards.items()}},
        "optimizer": _of(history, "optimizer_name", str) or "unknown" if state.get("last_optimizer_state") else None,
        **fingerprints(model, options, manifest),
        "save": manifest.save if manifest is not None else None,
        "provenance": manifest.provenance if manifest is not None else {},
        "shards": [asdict(shard) for shard in shards],
    }


def _of(given: Any, name: str, kind: type) -> Any:
    """Return an entry; None where there is none of this kind, as a file may say anything."""
    value = given.get(name) if isinstance(given, Mapping) else None
    return value if fits(value, kind) else None


def _router(options: Mapping[str, Any]) -> "str | None":
    """Return the router that was asked for; None for a model that has no such option."""
    return "none" if options.get("router") == "" else _of(options, "router", str)


def model_options(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the model's options as fairseq saves them; none where it does not."""
    configuration = state.get("cfg")
    options = configuration.get("model") if isinstance(configuration, Mapping) else None
    return options if isinstance(options, Mapping) else {}


def fingerprints(
    model: Mapping[str, Any], options: Mapping[str, Any], manifest: "Manifest | None"
) -> dict[str, "str | None"]:
    """Return the fingerprints of dictionary and table, by the manifest or else by the model's buffers."""
    if manifest is not None:
        return {
            "table_fingerprint": manifest.table_fingerprint,
            "dictionary_fingerprint": manifest.dictionary_fingerprint,
        }
    tables = tables_of(model, options, options.get("num_experts", 1))
    return {
        "table_fingerprint": fingerprint_of_tables([table.fingerprint for table in tables]),
        "dictionary_fingerprint": tables[0].record.dictionary_fingerprint if tables else None,
    }


def _sparse_layers(model: Iterable[str]) -> list[int]:
    """Return the numbers of the layers with experts, as --sparse-layers has them."""
    names = "\n".join(model)
    places, with_attention = (
        sorted({int(place) for place in re.findall(rf"^decoder\.layers\.(\d{{1,9}})\.{part}\.", names, re.MULTILINE)})
        for part in (r"(?!memory\.).*\.experts", "self_attn")
    )
    # A memory takes a place of its own before its layer, an inserted stack one behind it.
    return [sum(other <= place for other in with_attention) - 1 for place in places]


def _count(tensors: Mapping[str, Any]) -> int:
    """Return the number of parameters; tied ones count once."""
    sizes = {}
    for name, value in tensors.items():
        if value.dtype.is_floating_point and not name.endswith((".version", "._float_tensor")):
            memory = (value.data_ptr(), value.shape) if hasattr(value, "data_ptr") else name
            sizes[memory] = value.shape.numel()
    return sum(sizes.values())
