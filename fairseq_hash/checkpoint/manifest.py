"""The manifest: what the main file of a checkpoint says of its experts and of where it comes from."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from fairseq_hash.checkpoint.shards import Shard
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.fields import wrong_field

KEY = "fairseq_hash"  # of the main file's dictionary
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a main file says; plain values only, as torch loads nothing else without running code.

    Attributes:
        save: the name of this save, its own for each: the shards of no other have it.
        update: number of updates done.
        num_experts: E; 1 where the model is dense.
        router: `hash`, `switch`, `base`, or `none`.
        dictionary_fingerprint: SHA-256 of the dictionary's symbols.
        table_fingerprint: SHA-256 of the hash table; None without one.
        numbers: the number by which the optimizer's state knows each expert parameter, by name; empty without one.
        experts: the names, in the model's state, of the tensors that have a row for each expert.
        shards: where the experts are; none where the main file has them itself.
        provenance: versions, commit, hardware and date.
    """

    save: str
    update: int
    num_experts: int
    router: str
    dictionary_fingerprint: str
    table_fingerprint: "str | None"
    numbers: dict[str, int] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain dictionaries and lists."""
        lists = {"experts": list(self.experts), "shards": [asdict(shard) for shard in self.shards]}
        return {"format": FORMAT, **asdict(self), **lists}

    @classmethod
    def of(cls, state: Mapping[str, Any], path: object) -> "Manifest | None":
        """Return the manifest in a main file's `state`; None where there is none, as in files of fairseq itself.

        Raises:
            UserError: for a manifest of another version, one that is damaged, or one that names files elsewhere.
        """
        plain = state.get(KEY)
        if not isinstance(plain, Mapping) or "save" not in plain:
            return None
        if plain.get("format") != FORMAT:
            raise UserError(f"{path} has format {plain.get('format')}; this version of fairseq_hash reads {FORMAT}")
        values = {key: value for key, value in plain.items() if key != "format"}
        try:
            lists = {"experts": tuple(values.get("experts", ()))}
            lists["shards"] = tuple(Shard(**shard) for shard in values["shards"])
            manifest = cls(**{**values, **lists})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} has a damaged manifest ({error}); use another checkpoint") from None
        wrong = wrong_field(manifest)
        try:  # it may hold anything that JSON has, and a pickle holds more
            json.dumps(manifest.provenance)
        except (TypeError, ValueError, RecursionError):
            wrong = wrong or "provenance"
        if wrong is not None:
            raise UserError(f"{path} has a damaged manifest (its {wrong}); use another checkpoint")
        for shard in manifest.shards:
            if PurePosixPath(shard.file).is_absolute() or ".." in PurePosixPath(shard.file).parts:
                raise UserError(
                    f"{path} names the shard {shard.file}, which is not below its folder; use a checkpoint that "
                    "fairseq_hash has saved"
                )
        return manifest

    def part(self, part: str) -> list[Shard]:
        """Return the shards of `weights` or `optimizer` in the order of their experts."""
        return sorted((shard for shard in self.shards if shard.part == part), key=lambda shard: shard.first)

    def check(self, num_experts: int, dictionary_fingerprint: str, table_fingerprint: "str | None") -> None:
        """Raise `UserError` where a model has other experts, another dictionary or another table (None: not asked)."""
        if num_experts != self.num_experts:
            raise UserError(
                f"it has {self.num_experts} experts, this model has {num_experts}; give --num-experts "
                f"{self.num_experts}, or another --save-dir to start anew"
            )
        if dictionary_fingerprint != self.dictionary_fingerprint:
            raise UserError(
                f"it belongs to dictionary {self.dictionary_fingerprint[:12]}, this data has dictionary "
                f"{dictionary_fingerprint[:12]}; prepare the data with the checkpoint's dict.txt "
                "(fairseq-preprocess --srcdict)"
            )
        own, other = self.table_fingerprint, table_fingerprint
        if own is not None and other is not None and own != other:
            raise UserError(
                f"it has hash table {own[:12]}, this model has {other[:12]}; write the "
                "checkpoint's with fairseq-hash checkpoint table, and give that file as --hash-table"
            )


def expert_tensors(model: Mapping[str, Any], manifest: "Manifest | None") -> set[str]:
    """Return the names of the tensors in a model's state that have a row for each expert."""
    if manifest is not None and manifest.experts:
        return set(manifest.experts)
    # Files from before manifests listed them, and those of no training of ours: every sparse layer names its own so.
    return {name for name in model if ".experts." in name}


def require_all_experts(state: Mapping[str, Any], manifest: "Manifest | None", path: object) -> None:
    """Raise `UserError` for a main file that has one rank's share of the experts, and so no manifest."""
    if manifest is None and KEY in state:
        raise UserError(
            f"{path} has the experts of one rank only, as --ddp-backend fully_sharded saves them; give a checkpoint of "
            "all experts, such as a training with another --ddp-backend saves"
        )
