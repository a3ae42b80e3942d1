"""A dry run against real processes: the bytes of every collective to the byte, the memory within 1 to 3 %."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import ranks
from dry_run_ranks import experiment_of

from fairseq_hash.dry_run.hardware import GPUS
from fairseq_hash.dry_run.update import dry_run

CPU = replace(GPUS["h100"], is_gpu=False)  # no time is compared here
SMALL = [
    "model.decoder_embed_dim=64",
    "model.decoder_ffn_embed_dim=256",
    "dataset.max_tokens=512",
    "criterion.update_freq_ranks=0",
    "optimization.update_freq=[2]",
]
CASES = {
    "dense": ("laptop/dense", []),
    "hash": ("laptop/hash", []),
    "a capacity": ("laptop/hash_random", ["+model.capacity_factor=1.0"]),
    "multi-hash": ("laptop/multi_hash_2", []),
    "two layers, a table each": ("laptop/hash", ["model.sparse_layers='0,1'", "+model.hash_per_layer=true"]),
    "switch": ("laptop/switch", []),
    "top-k": ("laptop/topk_bias", []),
    "half precision": ("laptop/hash", ["common.bf16=true"]),
    "BASE": ("laptop/base", []),
    "recomputed": ("laptop/hash", ["+model.checkpoint_activations=true"]),
    "experts and memories": ("routers_2026/hash_memory", []),
}
ALONE = ("hash", "half precision", "recomputed")  # alone, a rank exchanges nothing
OF_2026 = {
    name: (f"routers_2026/{name}", ["+model.sinkhorn_tolerance=0"] if name == "sinkhorn" else [])
    for name in (
        *("gshard", "sinkhorn", "random_linear", "stablemoe", "topk_loss", "topk_quantile", "topk_bias_top2"),
        *("base_gate_one", "hash_norm", "memory"),
    )
}
FEATURES = ("bigram", "history", "position", "previous", "future")
OF_2026 |= {f"hash_{feature}": (f"laptop/hash_{feature}", []) for feature in FEATURES}


@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (1, {name: CASES[name] for name in ALONE}),
        (2, CASES),
        *(pytest.param(world, CASES, marks=pytest.mark.slow) for world in (4, 8, 16)),
        *(pytest.param(world, OF_2026, marks=pytest.mark.slow) for world in (1, 2, 4)),
    ],
)
def test_dry_run_is_what_a_rank_does(world, cases):
    cases = {case: (name, [*SMALL, *overrides]) for case, (name, overrides) in cases.items()}
    seen = ranks.run(world, "dry_run_ranks:measure_all", list(cases.values()), timeout=3000)
    found = {}
    for number, (case, (name, overrides)) in enumerate(cases.items()):
        of_ranks = [of_rank[number] for of_rank in seen]
        for rank in {0, world - 1}:
            plans = itertools.count()

            def rows(size, groups, choices, rank=rank, of_ranks=of_ranks, plans=plans):
                plan, first = next(plans), rank // size * size
                return [of_rank["chosen"][plan] for of_rank in of_ranks[first : first + size]]

            of = dry_run(experiment_of(name, overrides), world, rank, CPU, rows, lookups=rows)
            total = Counter()
            for call in of.calls:
                total[call.kind] += call.bytes
            # The profiler does not see what gloo's threads give back: beside others, a rank's real tensors are watched.
            seen_peak = of_ranks[rank]["peak" if world == 1 else "watched"]
            found[case, rank] = dict(total) == of_ranks[rank]["bytes"], sum(of.peak.values()) / seen_peak
            if world == 1:
                assert of_ranks[rank]["watched"] == pytest.approx(seen_peak, rel=0.01)
    most = 0.01 if world == 1 else 0.03  # gloo lets go of what it sent at no fixed time
    wrong = {case: share for case, (is_same, share) in found.items() if not is_same or abs(share - 1) > most}
    assert wrong == {}
