"""Checkpoints saved by some ranks and loaded by others: the same weights and moments, and the same training after it.

The yardstick is one process that trains without a stop. `-s` shows the largest relative differences of each pair.
"""

import functools
import json
import shutil
from itertools import pairwise

import pytest
import ranks
import recorded
import torch
from checkpoint_ranks import resume_all, save
from exactness import OPTIMIZERS, TOLERANCE, relative, whole
from plugin import USER_DIR, command
from safetensors import safe_open

EXPERTS, STOP, END = 24, 3, 6
# Ranks, and how many of them share one set of experts (0: as many as there are).
SHARINGS = {
    "1": (1, 0),
    "2": (2, 0),
    "3": (3, 0),
    "4": (4, 0),
    "8": (8, 0),
    "4 in groups of 2": (4, 2),
    "2 with all experts each": (2, 1),
    "3, placed": (3, 0),
    "4 in groups of 2, placed": (4, 2),
}
QUICK = {"1", "3", "4 in groups of 2", "3, placed"}


def arguments(sharing, folder):
    """Return the arguments of a training that takes 24 batches an update, of some 130 an epoch."""
    world_size, size = SHARINGS[sharing]
    given = ("--router", "hash", "--num-experts", EXPERTS, "--sparse-layers", "0,1", "--clip-norm", "0.2")
    given += (*OPTIMIZERS["adam"], "--max-tokens", "48", "--dropout", "0.0")
    # 180 rows of a memory in 24 shares: the last of them has rows that nobody looks up.
    given += ("--memory-layers", "1", "--memory-heads", "2", "--memory-rows", "45", "--memory-width", "8")
    if sharing.endswith("placed"):
        given += ("--expert-placement", "balanced")
    given += ("--update-freq", EXPERTS // world_size, "--expert-parallel-size", size, "--save-dir", folder)
    return tuple(map(str, given))


def on_ranks(sharing, function, *values):
    """Run a function of `checkpoint_ranks` on the ranks of a sharing; return what each returned."""
    world_size = SHARINGS[sharing][0]
    if world_size == 1:
        return [{"save": save, "resume_all": resume_all}[function](*values)]
    return ranks.run(world_size, f"checkpoint_ranks:{function}", *values, timeout=600)


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


@pytest.fixture(scope="module")
def resumed(data, saved):
    """Return a function of the sharing that loads, and of those that saved: what it loaded and what became of it."""

    @functools.cache
    def by(sharing, savers):
        cases = {saver: (*arguments(sharing, saved(saver)[0]), "--no-save") for saver in savers}
        return on_ranks(sharing, "resume_all", str(data), cases, END)

    return by


PAIRS = [
    pytest.param(saver, loader, marks=[] if {saver, loader} <= QUICK else [pytest.mark.slow])
    for saver in SHARINGS
    for loader in SHARINGS
]


@pytest.mark.parametrize(("saved_by", "loaded_by"), PAIRS)
def test_a_checkpoint_loads_at_any_number_of_ranks_and_training_goes_on(alone, saved, resumed, saved_by, loaded_by):
    _, before = saved(saved_by)
    held = [expert for record in before[: before[0]["size"]] for expert in record["experts"]]
    assert (held != sorted(held)) == saved_by.endswith("placed")
    savers = tuple(name for name in SHARINGS if name in QUICK or not {saved_by, loaded_by} <= QUICK)
    after = [record[saved_by] for record in resumed(loaded_by, savers)]
    assert [record["at"] for record in after] == [STOP] * len(after)
    for name in before[0]["state"]:
        was = whole(before, lambda record: record["state"], name)
        assert torch.equal(whole(after, lambda record: record["loaded"], name), was), name
    largest = {}
    for what in ("loss", "norm"):
        pairs = zip(before[0][what] + after[0][what], alone[what], strict=True)
        largest[what] = max(abs(value - expected) / expected for value, expected in pairs)
    largest["parameters"] = max(
        relative(whole(after, lambda record: record["state"], name), value)
        for name, value in alone["parameters"].items()
    )
    print(f"\nsaved by {saved_by}, loaded by {loaded_by}:", ", ".join(f"{k} {v:.1e}" for k, v in largest.items()))
    assert all(value <= TOLERANCE for value in largest.values()), largest


def test_each_expert_is_written_once_by_all_ranks(saved):
    for sharing in ("1", "3", "4 in groups of 2", "3, placed"):
        folder, before = saved(sharing)
        expected = SHARINGS[sharing][0]  # replicas share the work
        if sharing.endswith("placed"):  # a shard is of consecutive experts
            ids = [record["experts"] for record in before]
            expected = sum(1 + sum(expert != last + 1 for last, expert in pairwise(held)) for held in ids)
            assert expected > 3
        for part in ("weights", "optimizer"):
            files = sorted(folder.glob(f"experts/update-{STOP}.*.{part}.*.safetensors"))
            assert len(files) == expected
            held = []
            for path in files:
                with safe_open(path, framework="pt") as file:
                    about = json.loads(file.metadata()["about"])
                held += range(about["first"], about["first"] + about["experts"])
            assert sorted(held) == list(range(EXPERTS))
    assert not list(folder.rglob("*.partial"))


def test_without_experts_the_main_file_has_the_memories(data, tmp_path):
    words = (*arguments("1", tmp_path), "--router", "none")
    before, after = save(str(data), words, 2), resume_all(str(data), {"": (*words, "--no-save")}, 2)[""]
    main = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    name = "decoder.layers.1.memory.experts.weight"
    assert torch.equal(main["model"][name], before["state"][name]) and not list(tmp_path.glob("experts/*"))
    assert before["state"].keys() == after["loaded"].keys()
    assert all(torch.equal(value, after["loaded"][key]) for key, value in before["state"].items())
    with pytest.raises(SystemExit, match="its memory has other hash heads than this model; give the --memory-seed"):
        resume_all(str(data), {"": (*words, "--memory-seed", "7")}, 2)


def test_best_and_last_are_one_file(saved):
    folder, _ = saved("4 in groups of 2")
    assert (folder / "checkpoint_best.pt").samefile(folder / "checkpoint_last.pt")
    assert sum(1 for _ in folder.glob("experts/*")) == 8


def evaluate(data, path, *more, check=True):
    """Return `fairseq-eval-lm` of a checkpoint."""
    fixed = ("--user-dir", USER_DIR, "--cpu", "--tokens-per-sample", "16", "--gen-subset", "test")
    return command("eval_lm", data, *fixed, "--path", path, *more, check=check)


def loss_of(done):
    """Return the loss that `fairseq-eval-lm` logged."""
    return done.stderr.strip().splitlines()[-1].split(" | ")[-1]


def test_one_process_evaluates_what_any_number_has_saved(data, saved, tmp_path):
    expected = loss_of(evaluate(data, saved("1")[0] / "checkpoint_best.pt"))
    assert "Perplexity" in expected
    path = saved("3")[0] / "checkpoint_best.pt"
    assert loss_of(evaluate(data, path)) == expected
    # Experts that stay in their files, without the optimizer's: neither are needed.
    copy = shutil.copytree(saved("4 in groups of 2")[0], tmp_path / "copy")
    for shard in copy.glob("experts/*.optimizer.*"):
        shard.unlink()
    path = copy / "checkpoint_best.pt"
    assert loss_of(evaluate(data, path, "--model-overrides", "{'map_experts': True}")) == expected


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_load_takes_little_more_memory_than_what_it_loads(data, tmp_path, world_size):
    sizes = ("--decoder-embed-dim", "256", "--decoder-ffn-embed-dim", "1024", "--decoder-attention-heads", "4")
    words = ("--router", "hash", "--num-experts", "16", "--sparse-layers", "0,1", "--max-tokens", "256", *sizes)
    words += ("--save-dir", str(tmp_path))
    ranks.run(2, "checkpoint_ranks:save", str(data), words, 1)
    for grown, held in ranks.run(world_size, "checkpoint_ranks:load_and_measure", str(data), words):
        print(f"\n{world_size} ranks: {grown / held:.2f} times the {held / 1e6:.0f} MB that a rank holds")
        assert held > 100e6
        assert grown < 1.3 * held
