"""`plan --loads`: the batches are those that training takes, its counts those of a naive loop, its quantiles hold."""

import csv
import random
import re
from itertools import islice
from pathlib import Path

import numpy as np
import plugin
import pytest
import recorded
from called import call, refused
from hydra_configs import needs_current_hydra, write_configs
from made_runs import ROUTERS

from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.loads import batches_of_text, planned_loads
from fairseq_hash.lm.placement import place
from fairseq_hash.parallel.groups import ExpertParallel
from fairseq_hash.parallel.load_files import read_loads

pytestmark = needs_current_hydra
REPLICAS = ["+model.expert_placement=balanced", "+model.expert_replicas=6"]
EIGHT = ["model.num_experts=8", "common.seed=5"]


@pytest.fixture(scope="module")
def configs(data, tmp_path_factory):
    """The folder of configurations with the experiment tiny/hash."""
    return Path(write_configs(tmp_path_factory.mktemp("configs"), data, 4)[1])


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Binarized text whose lines have topics, as text has: train and valid alike, of 2,500 lines."""
    folder, generator = tmp_path_factory.mktemp("topics"), random.Random(3)
    words = [f"word{rank}" for rank in range(60)]
    for split in ("train", "valid"):
        lines = []
        for _ in range(2500):
            topic = generator.randrange(6)
            weights = [(8 if rank % 6 == topic else 1) / (rank + 5) for rank in range(60)]
            lines.append(" ".join(generator.choices(words, weights, k=12)))
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    prefixes = [f"--{split}pref={folder / split}.txt" for split in ("train", "valid")]
    plugin.command("preprocess", "--only-source", *prefixes, "--destdir", folder / "bin")
    return folder / "bin"


def composed(configs, data, *overrides):
    return compose(configs, "tiny/hash", [f"task.data='{data}'", *EIGHT, *overrides])


@pytest.mark.parametrize("mode", ["none", "eos"])
def test_batches_are_those_of_the_trainer(configs, data, mode):
    """In their order, for one rank and for each of two; with a sentence a sample there is padding."""
    config = composed(configs, data, f"task.sample_break_mode={mode}").config
    found = list(batches_of_text(config, data, "train", 96))
    words = ("--router", "hash", "--num-experts", "8", "--sparse-layers", "1", "--max-tokens", "96")
    trainer, _ = recorded.make_trainer(data, (*words, "--sample-break-mode", mode))
    expected = [batch["net_input"]["src_tokens"] for batch in trainer.get_train_iterator(1).next_epoch_itr()]
    assert len(found) == len(expected) > 50
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    assert sum(int((token_BL == 1).any()) for token_BL in found) > (5 if mode == "eos" else 0)
    for rank in range(2):
        of_rank = trainer.task.get_batch_iterator(
            trainer.task.dataset("train"), max_tokens=96, max_positions=16, ignore_invalid_inputs=True,
            required_batch_size_multiple=8, seed=5, num_shards=2, shard_id=rank, epoch=1, disable_iterator_cache=True,
        ).next_epoch_itr()  # fmt: skip
        theirs = [batch["net_input"]["src_tokens"] for batch in of_rank if batch]
        assert all(one.equal(other) for one, other in zip(found[rank::2], theirs, strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["+model.hash_per_layer=true"],
        ["+model.experts_per_token=2", "model.hash_table=scattered"],
        ["+model.multi_hash=2", "+model.capacity_factor=0.9"],
        ["+model.hash_feature=bigram", "model.hash_table=random", "+model.hash_buckets=97"],
        ["task.sample_break_mode=eos"],
    ],
)
def test_loads_of_a_text_are_those_of_a_loop_over_the_models_routes(configs, data, overrides):
    """By layer: the experts of every token that is no padding, as the model's own routes have them."""
    experiment = composed(configs, data, *overrides)
    config = experiment.config
    planned = planned_loads(experiment, 4, [64], 6, (data, "train"))
    words = ["--router", "hash", "--num-experts", "8", "--sparse-layers", "0,1"]
    for override in overrides:
        key, value = override.partition(".")[2].split("=")
        words += [f"--{key.replace('_', '-')}", *([] if value == "true" else [value])]
    _, _, model, _ = plugin.build(data, *words)
    batches = list(islice(batches_of_text(config, data, "train", 64), 24))
    assert list(planned.loads) == [0, 1]
    columns = config.model.get("multi_hash", 1)
    for layer in (0, 1):
        load, stragglers, dropped, total = [0] * 8, [], 0, 0
        for at in range(0, 24, 4):
            rows = [0, 0, 0, 0]
            for token_BL in batches[at : at + 4]:
                routes = model.train().decoder.routing_context(token_BL).hash_routes
                plan = routes[layer if len(routes) > 1 else 0]
                experts = [int(group) // columns for group in plan.assignment.expert_TK.flatten()]
                for expert in experts:
                    load[expert] += 1
                for group, count in enumerate(plan.plan.sizes.host):
                    rows[group // columns // 2] += count
                dropped, total = dropped + plan.plan.dropped, total + len(experts)
            stragglers.append(max(rows) / (sum(rows) / 4))
        assert planned.loads[layer].tolist() == load
        parallel = planned.placements["contiguous"]
        of_layer = planned.batches[64][layer]
        factor = planned.capacity_factor
        assert of_layer.stragglers(parallel, factor).tolist() == pytest.approx(stragglers)
        assert of_layer.dropped_share(factor) == pytest.approx(dropped / total)
    assert planned.rows()[0]["straggler"] >= 1


def test_quantiles_hold_on_batches_that_were_not_used(configs, topics):
    """Those of train's batches for valid's; tokens drawn by the counts alone vary less, and are said to."""
    experiment = composed(configs, topics, "model.hash_table=random")
    used, held_out = (planned_loads(experiment, 4, [128], 1000, (topics, split)) for split in ("train", "valid"))
    drawn = planned_loads(experiment, 4, [128], 1000)
    assert "independently" in drawn.source and "independently" not in used.source
    for name in ("contiguous", "balanced"):
        parallel = used.placements[name]
        predicted, new, alone = (of.batches[128][1].stragglers(parallel) for of in (used, held_out, drawn))
        assert min(len(predicted), len(new)) >= 60
        over = (new > np.quantile(predicted, 0.95)).mean()
        # Of 60 passes 3 are expected; the quantile is itself one of 60.
        assert over <= 0.15 and np.quantile(predicted, 0.95) == pytest.approx(np.quantile(new, 0.95), rel=0.05)
        assert new.mean() == pytest.approx(predicted.mean(), rel=0.03)
        assert np.quantile(alone, 0.95) < np.quantile(new, 0.95)
    before, after = (held_out.batches[128][1].stragglers(used.placements[name]) for name in ("contiguous", "balanced"))
    assert after.mean() < before.mean()  # by the counts of train, on valid


def test_groups_of_ranks_wait_among_themselves(configs, data):
    """E < W: 16 ranks in two groups of 8, of one expert each; a pass is of 8 batches."""
    experiment = composed(configs, data)
    sixteen, eight = (planned_loads(experiment, ranks, [64], 3) for ranks in (16, 8))
    assert sixteen.place.size == 8 and list(sixteen.placements) == ["contiguous"]
    assert [row["straggler"] for row in sixteen.rows()] == [row["straggler"] for row in eight.rows()]


def test_the_command_shows_and_writes_what_a_placement_takes(configs, data, tmp_path):
    words = ("plan", "--config-dir", configs, "--config-name", "tiny/hash", "model.num_experts=8", "--ranks", "4")
    out = tmp_path / "loads.csv"
    status, shown, _ = call(*words, "--loads", "--batch-tokens", "64,256", "--passes", "20", "--out", out)
    assert status == 0 and "4 ranks share 8 experts, 2 each" in shown
    assert "tokens drawn independently" in shown
    assert re.findall(r"^0, 1 +(contiguous|balanced) .* (64|256) +20 ", shown, re.MULTILINE) == [
        (name, size) for name in ("contiguous", "balanced") for size in ("64", "256")
    ]
    loads = read_loads(out, 8)
    lines = (data.parent / "train.txt").read_text().splitlines()
    assert loads[0].sum() == sum(len(line.split()) + 1 for line in lines) + 2  # <s> and <unk> count 1
    parallel = place(ExpertParallel(8, 4, 0, 4), loads)
    # The file places the experts as the table itself does.
    status, shown, _ = call(*words, f"+model.expert_placement='{out}'", "--loads", "--passes", "20")
    figures = {line.split()[2]: line.split()[3:] for line in shown.splitlines() if line.startswith("0, 1 ")}
    assert status == 0 and len(figures) == 3 and figures["balanced"] == next(iter(figures.values()))
    status, shown, _ = call(*words, "+model.expert_placement=balanced", "--loads", "--out", out, "--overwrite")
    with out.open() as file:
        ranks = [int(line["rank"]) for line in csv.DictReader(file) if line["layer"] == "1"]
    assert [[expert for expert in range(8) if ranks[expert] == rank] for rank in range(4)] == [
        list(parallel.experts_at(rank)) for rank in range(4)
    ]
    status, shown, _ = call(*words, "+model.expert_placement=balanced", "criterion.update_freq_ranks=4")
    assert (
        "4 ranks share 8 experts by --expert-placement balanced (--loads shows it)" in shown and "all is there" in shown
    )


def test_the_command_shows_what_replicas_give(configs, data, tmp_path):
    """Beside the same placement without them, by the table and by a file; the fullest rank has less."""
    words = ("plan", "--config-dir", configs, "--config-name", "tiny/hash", "model.num_experts=8", "--ranks", "4")
    words += ("--loads", "--batch-tokens", "256", "--passes", "20")
    replicas, out = "+model.expert_replicas=8", tmp_path / "loads.csv"
    assert call(*words, "--out", out)[0] == 0
    figures = {}
    for placement in (out, "balanced"):
        more = ("--out", out, "--overwrite") if placement == "balanced" else ()
        status, shown, err = call(*words, f"+model.expert_placement='{placement}'", replicas, *more)
        assert status == 0, err
        assert "4 ranks share 8 experts and 8 replicas, 4 each" in shown
        lines = [re.split("  +", line)[1:] for line in shown.splitlines() if line.startswith("0, 1 ")]
        names = [] if placement == "balanced" else [f"{out}"[:12] + "..."]
        assert [line[0] for line in lines] == ["8 replicas", *names, "contiguous", "balanced"]
        figures[placement] = {line[0]: [float(word) for word in line[1:4] + line[6:8]] for line in lines}
    # The file places the experts as the table itself does.
    assert figures["balanced"].items() <= figures[out].items()
    of_table = figures["balanced"]
    assert all(fewer < more for fewer, more in zip(of_table["8 replicas"][1:], of_table["balanced"][1:], strict=True))
    with out.open() as file:  # of copies, the first
        ranks = {int(line["expert"]): int(line["rank"]) for line in csv.DictReader(file) if line["layer"] == "1"}
    parallel = place(ExpertParallel(8, 4, 0, 4), read_loads(out, 8), 8)
    first = {expert: min(rank for rank in range(4) if expert in parallel.experts_at(rank)) for expert in range(8)}
    assert ranks == first


def test_the_loads_of_a_run_place_the_experts_of_a_learned_router(configs, data, tmp_path):
    done = plugin.train(
        data, tmp_path / "run", *ROUTERS["switch"], "--log-expert-loads", "--max-update", "3", "--no-save"
    )
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "train.log").write_text(done.stderr + done.stdout)
    words = ("plan", "--config-dir", configs, "--config-name", "tiny/hash", "router=switch", "model.sparse_layers='1'")
    out = tmp_path / "loads.csv"
    status, shown, err = call(*words, "--ranks", "2", "--loads", "--from-run", tmp_path / "run", "--out", out)
    assert status == 0, err
    logged = [record["layer1_load"] for record in plugin.records(done, "train_inner")]
    expected = np.mean([np.array(load, dtype=float) for load in logged[1:]], axis=0)
    assert read_loads(out, 4)[1] == pytest.approx(expected)
    assert "by this run" in shown and "mean, 95 %" not in shown
    place_of_file = (*words, "--ranks", "2", f"+model.expert_placement='{out}'")
    assert "by --expert-placement" in call(*place_of_file)[1] and call(*place_of_file, "--check")[0] == 0
    line = refused(*words, "--ranks", "2", "--loads")
    assert "tiny/hash has no hash layer" in line and "--from-run" in line
    line = refused(*words, "--ranks", "2", "+model.expert_placement=balanced", "--check")
    assert "--expert-placement balanced needs the tables of hash layers, and --router switch has none" in line


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--text", "x"], "--text goes with --loads; add --loads"),
        (["--loads", "--from-run", "x", "--passes", "3"], "--passes does not go with --from-run"),
        (["--loads", "--subset", "valid"], "--subset names a part of --text"),
        (["--loads", "--overwrite"], "--overwrite replaces --out FILE"),
        (["--loads", "--passes", "0"], "--passes 0 is out of range"),
        (["--loads", "--batch-tokens", "64,a"], "--batch-tokens 64,a is no list of numbers of tokens"),
        (["--loads", "--batch-tokens", "8"], "--batch-tokens 8 holds no sample of task.tokens_per_sample=16"),
        (["--loads", "--text", "nowhere"], "task.data=nowhere holds no dict.txt"),
        (["--loads", "--from-run", "nowhere"], "nowhere"),
        (["--loads", "--from-run", "x", "+model.expert_placement=balanced"], "is by hash tables, --from-run by a run"),
        (["--loads", "+model.expert_placement=no.csv"], "cannot read no.csv"),
        (["--check", "+model.expert_placement=no.csv"], "cannot read no.csv"),
        (["--check", "+model.expert_placement=balanced", "model.num_experts=2"], "here each of 2 holds one"),
        (["--check", "+model.expert_placement=balanced", "--ranks", "1"], "here each of 1 holds all"),
        (["--check", *REPLICAS, "+model.expert_parallel_size=1"], "here each of 2 holds all"),
        (["--check", *REPLICAS], "--expert-replicas 6 are more than 4, with which each of the 2 ranks"),
        (
            ["--check", "+model.expert_placement=balanced", "+model.expert_replicas=3"],
            "--expert-replicas 3 cannot be shared evenly by the 2 ranks of a group; give a multiple of 2",
        ),
        (["--check", "+model.expert_replicas=2"], "--expert-replicas 2 copies the experts with the largest loads; "),
        (
            ["--loads", "+model.hash_feature=bigram", "model.hash_table=random"],
            "--loads: a dictionary does not count the keys of a hash table of bigram; count them in a text",
        ),
    ],
)
def test_what_is_refused(configs, more, line):
    words = ("plan", "--config-dir", configs, "--config-name", "tiny/hash", "--ranks", "2")
    assert line in refused(*words, *more)
