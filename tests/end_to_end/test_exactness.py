"""One process or many, the same training: loss, gradient norm, every gradient and every parameter.

W processes are compared with one process that takes the same batches one after the other (`--update-freq W`), in fp32.
What they add up is the same, in another order: a rounding of 6e-8 each time, which 12 updates make larger. 1e-5 leaves
an order of magnitude above the largest difference seen; a wrong scale, a lost row or an expert left out of the norm is
far beyond it. `-s` shows the largest relative differences of each case.

Two processes run every case but half of the pairs of router and optimizer. Of three and four the default suite has what
only they can show (`OF_MANY`). The others are marked slow
(`bash scripts/test.sh -m slow tests/end_to_end/test_exactness.py`).
"""

import dataclasses
import functools
import re

import numpy as np
import pytest
import ranks
import recorded
from exactness import OPTIMIZERS, TOLERANCE, arguments, one_process, relative, whole

from fairseq_hash.cli.tables import read_dictionary
from fairseq_hash.hashing import TableShape, build_table, save_table

WORLDS = (2, 3, 4)
# By the table, and by a file that names every expert's load.
PLACED = ("--expert-placement", "balanced"), ("--expert-placement", "{loads}")
OF_MANY = (
    "placed by the table",
    "replicas, placed by the table",
    "replicas in groups of two, placed by a file",
    "groups of two, placed by a file",
    "hash, 6 experts, adam",
    "hash, 8 experts, adam",
    "switch, 4 experts, sgd",
    "groups of two",
    "no groups",
)


def cases(world_size):
    """Return the arguments of all cases of a world, by name."""
    made, inserted = {}, ("--sparse-placement", "insert", "--expert-sublayers", "2")
    torch_ddp, by_fairscale = ("--ddp-backend", "pytorch_ddp"), ("--expert-dispatch", "fairscale")
    for experts in (2 * world_size, world_size, *([world_size // 2] if world_size % 2 == 0 else [])):
        for router in ("hash", "switch"):
            for optimizer in OPTIMIZERS:
                made[f"{router}, {experts} experts, {optimizer}"] = arguments(router, experts, optimizer)
    made["one rank gets no rows"] = arguments("hash", world_size, "sgd", "--hash-table", "{all_to_first}")
    made["several batches a rank"] = arguments("hash", world_size, "sgd", "--update-freq", "2")
    made["checkpointed activations"] = arguments("hash", world_size, "sgd", "--checkpoint-activations")
    made["pytorch_ddp"] = arguments("hash", world_size, "adam", *torch_ddp)
    made["pytorch_ddp, several batches a rank"] = arguments(
        "switch", world_size, "sgd", *torch_ddp, "--update-freq", "2"
    )
    made["switch with capacity"] = arguments("switch", 2 * world_size, "sgd", "--capacity-factor", "1.0")
    made["base, each rank's own batch balanced"] = arguments("base", world_size, "sgd", "--base-balance", "local")
    made["dispatch by fairscale"] = arguments("switch", 2 * world_size, "sgd", *by_fairscale)
    made["inserted stacks of hash layers"] = arguments("hash", world_size, "sgd", *inserted)
    replicas = (*PLACED[0], "--expert-replicas", str(world_size))
    made["replicas, placed by the table"] = arguments("hash", world_size if world_size > 2 else 4, "adam", *replicas)
    if world_size == 2:
        by_file = (*PLACED[1], "--expert-replicas", "2", "--capacity-factor", "0.8", *torch_ddp, "--update-freq", "2")
        made["replicas by a file, placed, with capacity, pytorch_ddp"] = arguments("switch", 4, "sgd", *by_file)
        made["replicas of segments, placed"] = arguments("hash", 6, "sgd", *replicas, "--multi-hash", "2")
        second = ("--second-expert-policy", "all", "--capacity-factor", "0.8")
        made["gshard with capacity"] = arguments("gshard", 4, "sgd", *second)
        made["sinkhorn, each rank's own batch balanced"] = arguments(
            "sinkhorn", 4, "sgd", "--sinkhorn-balance", "local", "--checkpoint-activations"
        )
        chosen = ("--capacity-factor", "1.5", "--eval-capacity-factor", "2")
        made["expert choice"] = arguments("expert-choice", 4, "sgd", *chosen)
        learned = ("--experts-per-token", "2", "--hash-weights", "learned", "--shared-expert", "--hash-scale", "1.5")
        bigrams = ("--hash-feature", "bigram", "--hash-table", "random")
        made["learned weights of two experts, a shared one"] = arguments("hash", 4, "sgd", *learned, *bigrams)
        tables = ("--multi-hash", "4", "--hash-per-layer")
        made["two experts by fairscale"] = arguments("hash", 4, "sgd", "--experts-per-token", "2", *by_fairscale)
        made["four segments, a table for each layer"] = arguments("hash", 4, "adam", *tables)
        made["segments by fairscale"] = arguments("hash", 2, "sgd", "--multi-hash", "2", *by_fairscale)
        fair = ("--gate", "one", "--expert-layer-norm", "--hash-scale", "0.5", "--capacity-factor", "1.0")
        made["gate one, a norm of the experts, hash then switch"] = arguments("hash,switch", 4, "sgd", *fair)
        # Some updates of each stage.
        two_stages = ("--stable-updates", "5", "--load-balance-weight", "0.3")
        made["stablemoe, then random-linear"] = arguments("stablemoe,random-linear", 4, "adam", *two_stages)
        top_2 = ("--experts-per-token", "2", "--router-score", "sigmoid", "--normalize-weights")
        made["top 2 by bias, a sequence-wise loss"] = arguments(
            "topk", 4, "sgd", *top_2, "--balancing", "bias", "--bias-step", "0.01", "--sequence-loss"
        )
        made["top 2 by quantile"] = arguments("topk", 4, "sgd", *top_2, "--balancing", "quantile")
        memory = ("--memory-layers", "0,1", "--memory-rows", "29", "--memory-width", "8", "--memory-heads", "2")
        made["memories beside experts"] = arguments("hash", 4, "adam", *memory, "--memory-orders", "1,2,3")
        made["memories without experts"] = arguments("none", 4, "sgd", *memory)
        made["placed by two tables, a memory"] = arguments("hash", 8, "adam", *PLACED[0], "--hash-per-layer", *memory)
        made["segments, placed"] = arguments("hash", 6, "sgd", *PLACED[0], "--multi-hash", "2")
        full = ("--capacity-factor", "0.8", *by_fairscale)
        made["switch by fairscale, placed by a file"] = arguments("switch", 4, "sgd", *PLACED[1], *full)
        made["gated, hash then switch"] = arguments("hash,switch", 4, "sgd", "--expert-form", "swiglu")
    if world_size == 4:
        made["placed by the table"] = arguments("hash", 8, "adam", *PLACED[0])
        made["groups of two, placed by a file"] = arguments(
            "switch", 4, "adam", "--expert-parallel-size", "2", *PLACED[1]
        )
        made["replicas in groups of two, placed by a file"] = arguments(
            "switch", 4, "adam", "--expert-parallel-size", "2", *PLACED[1], "--expert-replicas", "2"
        )
        made["groups of two"] = arguments("hash", 8, "adam", "--expert-parallel-size", "2")
        made["no groups"] = arguments("hash", 8, "sgd", "--expert-parallel-size", "1")
    return made


@pytest.fixture(scope="module")
def trainings(data, tmp_path_factory):
    """Return a function of the world size and of slow: by case, the record of one process and those of all ranks."""

    @functools.cache
    def train(world_size, slow):
        table = build_table("balanced", *read_dictionary(data / "dict.txt"), TableShape(world_size), 0)
        path = tmp_path_factory.mktemp("tables") / "all to the first.safetensors"
        save_table(dataclasses.replace(table, expert_HK=np.zeros_like(table.expert_HK)), path)
        loads = path.with_name("loads.csv")
        given = zip(range(4), (5, 4, 2, 1), strict=True)  # the first and the last share a rank
        loads.write_text("layer,expert,load\n" + "".join(f"1,{expert},{load}\n" for expert, load in given))
        chosen = {
            name: tuple(word.format(all_to_first=path, loads=loads) for word in words)
            for name, words in cases(world_size).items()
            if is_slow(world_size, name) == slow
        }
        many = ranks.run(world_size, "recorded:train_all", str(data), chosen)
        alone = recorded.train_all(data, {name: one_process(words, world_size) for name, words in chosen.items()})
        return {name: (alone[name], [record[name] for record in many]) for name in chosen}

    return train


def is_slow(world_size, name):
    if world_size == 2:
        return bool(re.fullmatch("hash, . experts, sgd|switch, . experts, adam", name))
    return name not in OF_MANY


@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        pytest.param(size, name, marks=[pytest.mark.slow] if is_slow(size, name) else [])
        for size in WORLDS
        for name in cases(size)
    ],
)
def test_many_processes_train_as_one(trainings, world_size, name):
    alone, many = trainings(world_size, is_slow(world_size, name))[name]
    assert len(alone["loss"]) == len(alone["norm"]) == recorded.UPDATES
    assert alone["dummies"] == 0
    held = [expert for record in many[: many[0]["size"]] for expert in record["experts"]]
    assert (held != sorted(held)) == ("placed" in name)
    assert (len(held) > len(set(held))) == ("replicas" in name)
    # Otherwise the case of a rank without a batch was not there.
    assert sum(record["dummies"] for record in many) > 0
    assert max(alone["norm"]) > 0.2, "clipping is not active"
    largest = {}
    for what in ("loss", "norm", "validation"):
        assert all(record[what] == many[0][what] for record in many), "ranks differ"
    for what in ("loss", "norm"):
        pairs = zip(many[0][what], alone[what], strict=True)
        largest[what] = max(abs(value - expected) / expected for value, expected in pairs)
    # One process adds up 13 batches, where W have W at a time.
    expected = sum(alone["validation"])
    largest["validation"] = abs(sum(many[0]["validation"]) - expected) / expected
    largest["gradients"] = max(
        difference(name, value, whole(many, lambda record, u=update: record["gradients"][u], name), alone["norm"])
        for update, gradients in enumerate(alone["gradients"])
        for name, value in gradients.items()
    )
    largest["parameters"] = max(
        relative(whole(many, lambda record: record["parameters"], name), value)
        for name, value in alone["parameters"].items()
    )
    print(f"\n{world_size} processes, {name}:", ", ".join(f"{key} {value:.1e}" for key, value in largest.items()))
    assert all(value <= TOLERANCE for value in largest.values()), largest


def difference(name, reference, tensor, norms):
    """Return the relative difference of a gradient."""
    if name.endswith("k_proj.bias"):
        # Softmax does not change where all scores do by the same: the true gradient is zero, what is there rounding.
        assert max(tensor.abs().max(), reference.abs().max()) < 1e-6 * max(norms)
        return 0.0
    return relative(tensor, reference)
