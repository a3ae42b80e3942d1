"""Checkpoints do not depend on replicas: saved with copies of experts and loaded without, and the other way round.

The yardstick is one process that trains without a stop, as in `test_checkpoints`.
"""

import functools
import json

import pytest
import ranks
import recorded
import torch
from checkpoint_ranks import resume_all, save
from exactness import OPTIMIZERS, TOLERANCE, relative, whole
from safetensors import safe_open

EXPERTS, BATCHES, STOP, END = 6, 12, 2, 4
# Ranks, how many of them share one set of experts, and replicas in each group.
SHARINGS = {"1": (1, 1, 0), "3": (3, 3, 0), "3 with 6": (3, 3, 6), "4 in groups of 2 with 2": (4, 2, 2)}


def arguments(sharing, folder):
    """Return the arguments of a training that takes 12 batches an update."""
    world_size, size, replicas = SHARINGS[sharing]
    given = ("--router", "hash", "--num-experts", EXPERTS, "--sparse-layers", "0,1", "--clip-norm", "0.2")
    given += (*OPTIMIZERS["adam"], "--max-tokens", "48", "--expert-parallel-size", size, "--save-dir", folder)
    if replicas:
        given += ("--expert-placement", "balanced", "--expert-replicas", replicas)
    return tuple(map(str, (*given, "--update-freq", BATCHES // world_size)))


def on_ranks(sharing, function, *values):
    """Run a function of `checkpoint_ranks` on the ranks of a sharing; return what each returned."""
    if SHARINGS[sharing][0] == 1:
        return [{"save": save, "resume_all": resume_all}[function](*values)]
    return ranks.run(SHARINGS[sharing][0], f"checkpoint_ranks:{function}", *values)


@pytest.fixture(scope="module")
def alone(data):
    """One process that trains to the end without a stop."""
    words = [word for word in arguments("1", "nowhere") if word not in ("--save-dir", "nowhere")]
    return recorded.train(data, words, END)


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """Return a function of the sharing: the folder of its checkpoint, and what its ranks had when they saved it."""
    root = tmp_path_factory.mktemp("saved by")

    @functools.cache
    def by(sharing):
        return root / sharing, on_ranks(sharing, "save", str(data), arguments(sharing, root / sharing), STOP)

    return by


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        ("3 with 6", "1"),
        ("3 with 6", "4 in groups of 2 with 2"),
        ("1", "3 with 6"),
        pytest.param("4 in groups of 2 with 2", "3", marks=pytest.mark.slow),
        pytest.param("4 in groups of 2 with 2", "4 in groups of 2 with 2", marks=pytest.mark.slow),
        pytest.param("3", "4 in groups of 2 with 2", marks=pytest.mark.slow),
    ],
)
def test_weights_and_moments_are_the_same_and_the_training_goes_on(data, alone, saved, saved_by, loaded_by):
    """Of both each copy is loaded: `whole` compares copies to the bit."""
    folder, before = saved(saved_by)
    words = (*arguments(loaded_by, folder), "--no-save")
    after = [record["loaded"] for record in on_ranks(loaded_by, "resume_all", str(data), {"loaded": words}, END)]
    size = SHARINGS[loaded_by][1]
    held = [expert for record in after[:size] for expert in record["experts"]]
    assert len(held) == EXPERTS + SHARINGS[loaded_by][2] and set(held) == set(range(EXPERTS))
    for name in before[0]["state"]:
        was = whole(before, lambda record: record["state"], name)
        assert torch.equal(whole(after, lambda record: record["loaded"], name), was), name
    for what in ("loss", "norm"):
        assert before[0][what] + after[0][what] == pytest.approx(alone[what], rel=TOLERANCE)
    for name, value in alone["parameters"].items():
        assert relative(whole(after, lambda record: record["state"], name), value) <= TOLERANCE


def test_each_expert_is_written_once(saved):
    for sharing in ("3 with 6", "4 in groups of 2 with 2"):
        folder, before = saved(sharing)
        assert sum(len(record["experts"]) for record in before[: SHARINGS[sharing][1]]) > EXPERTS
        for part in ("weights", "optimizer"):
            held = []
            for path in folder.glob(f"experts/update-{STOP}.*.{part}.*.safetensors"):
                with safe_open(path, framework="pt") as file:
                    about = json.loads(file.metadata()["about"])
                held += range(about["first"], about["first"] + about["experts"])
            assert sorted(held) == list(range(EXPERTS))
