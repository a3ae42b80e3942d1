"""The parts of a dry run by hand: rows, collectives, rates, hardware files, what is refused, and what is printed."""

import io
from dataclasses import replace

import pytest
import torch
import yaml
from dry_run_ranks import experiment_of
from rich.console import Console

from fairseq_hash.core.errors import UserError
from fairseq_hash.dry_run.collectives import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Collective
from fairseq_hash.dry_run.hardware import GPUS, Hardware, as_yaml, hardware
from fairseq_hash.dry_run.known_rows import KnownDispatcher, even_rows
from fairseq_hash.dry_run.report import in_nodes, seconds_of, show
from fairseq_hash.dry_run.roofline import Roofline
from fairseq_hash.dry_run.update import batches_of, dry_run
from fairseq_hash.experiments.sizes import sizes
from fairseq_hash.parallel.groups import ExpertParallel

SMALL = ["model.decoder_embed_dim=64", "model.decoder_ffn_embed_dim=256", "dataset.max_tokens=512"]
ANY = "criterion.update_freq_ranks=0"


@pytest.mark.parametrize(("groups", "choices"), [(4, 10), (7, 7), (16, 3), (3, 0)])
def test_even_rows_are_all_choices(groups, choices):
    rows_PE = even_rows(3, groups, choices)
    assert [sum(rows_E) for rows_E in rows_PE] == [choices] * 3
    assert max(rows_PE[0]) - min(rows_PE[0]) <= 1


def test_known_plan_is_cut_to_the_capacity():
    """Of 8 choices among 4 experts with a capacity factor of 1, an expert takes 2."""
    dispatcher = KnownDispatcher(ExpertParallel(4), lambda ranks, groups, choices: [[5, 2, 1, 0]])
    plan = dispatcher.begin(torch.zeros(8, 1, dtype=torch.int64), 1.0).plan
    assert plan.rows_per_expert == (2, 2, 1, 0) and plan.dropped == 3 and len(plan.choice_R) == 5


def ring(ranks, ranks_per_node, size, passes):
    """Send shares of a tensor around a ring that leaves a node after its last rank; return the mean inside, between."""
    sent = {True: 0.0, False: 0.0}
    for place, rank in enumerate(ranks):
        following = ranks[(place + 1) % len(ranks)]
        sent[rank // ranks_per_node == following // ranks_per_node] += passes * size
    return sent[True] / len(ranks), sent[False] / len(ranks)


@pytest.mark.parametrize("ranks", [range(1), range(2), range(8), range(16), range(3, 32, 8)])
@pytest.mark.parametrize("ranks_per_node", [1, 4, 8])
def test_collectives_over_the_wire(ranks, ranks_per_node):
    """An all-reduce is n - 1 steps of reduce-scatter and n - 1 of all-gather, with an n-th of the tensor each."""
    ranks = tuple(ranks)
    n, rank = len(ranks), ranks[-1]
    reduced = Collective(ALL_REDUCE, ranks, rank, 960).over_wire(ranks_per_node)
    assert reduced == pytest.approx(ring(ranks, ranks_per_node, 960 / n, 2 * (n - 1)))
    gathered = Collective(ALL_GATHER, ranks, rank, 960).over_wire(ranks_per_node)
    assert gathered == pytest.approx(ring(ranks, ranks_per_node, 960, n - 1))
    sent_P = tuple(range(10, 10 + n))
    exchanged = Collective(ALL_TO_ALL, ranks, rank, sum(sent_P), sent_P).over_wire(ranks_per_node)
    node = rank // ranks_per_node
    inside = sum(sent for to, sent in zip(ranks, sent_P, strict=True) if to != rank and to // ranks_per_node == node)
    assert exchanged == (inside, sum(sent_P) - sent_P[-1] - inside)


def test_roofline_by_hand():
    """A product takes its FLOPs at the rate of its dtype, a sum its bytes; a view takes nothing."""
    on = Hardware("test", "by hand", 1e9, {"float32": 1e-6, "bfloat16": 2e-6}, 1e-3, 10.0, 1, 1, 1)
    one, other = torch.ones(10, 20), torch.ones(20, 30)
    with Roofline(on) as time:
        one @ other
        one.to(torch.bfloat16) @ other.to(torch.bfloat16)
        one.view(200).t()
        one + one
    assert time.flops == 2 * 2 * 10 * 20 * 30
    assert time.seconds["products"] == pytest.approx(12_000 / 1e6 + 12_000 / 2e6)
    halved = (200 * 4 + 200 * 2) + (600 * 4 + 600 * 2)
    assert time.seconds["memory"] == pytest.approx((halved + 3 * 800) / 1e6)
    assert time.seconds["calls"] == pytest.approx(5 * 10e-6)
    with Roofline(replace(on, cache=3000, cached_bandwidth=1.0)) as time:
        one + one
    assert time.seconds["memory"] == pytest.approx(2400 / 1e9)


@pytest.mark.parametrize("name", ["laptop/dense", "laptop/hash", "laptop/topk_bias"])
def test_flops_are_those_of_the_sizes(name):
    """Forward and backward are three products; attention has two forward and five backward, with its recomputation."""
    experiment = experiment_of(name, [*SMALL, ANY])
    of, counted = dry_run(experiment, 1, 0, replace(GPUS["h100"], is_gpu=False)), sizes(experiment)
    expected = 3 * counted.flops_per_token + 3.5 * counted.attention_flops_per_token
    assert of.flops == pytest.approx(of.tokens * expected, rel=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gpu_multiplies_in_its_own_way(dtype):
    """On a GPU the products are grouped or padded; the rows and the exchange are the same."""
    experiment = experiment_of("laptop/hash", [*SMALL, ANY, f"common.bf16={str(dtype == 'bf16').lower()}"])
    on_gpu = dry_run(experiment, 4, 1, GPUS["h200"])
    on_cpu = dry_run(experiment, 4, 1, replace(GPUS["h200"], is_gpu=False))
    assert on_gpu.calls == on_cpu.calls
    assert on_gpu.flops == pytest.approx(on_cpu.flops, rel=0.05)


def test_world_of_4096_ranks():
    """Every rank has its place; each sends what it does not keep."""
    experiment = experiment_of("laptop/switch", [*SMALL, ANY, "model.num_experts=64"])
    first, last = (dry_run(experiment, 4096, rank, GPUS["h100"]) for rank in (0, 4095))
    assert first.place.size == last.place.size == 64 and list(last.place.expert_ids) == [63]
    assert {len(call.ranks) for call in last.calls} == {64, 4096}
    rows = [call for call in last.calls if call.kind == ALL_TO_ALL and call.bytes > 10_000]
    assert all(call.sent_P[63] < call.bytes for call in rows)


def test_dry_runs_do_not_see_each_other():
    """What one logs is nothing to the next one, which may have another number of experts."""
    experiment = experiment_of("laptop/hash", [*SMALL, ANY])
    first = dry_run(experiment, 2, 0, GPUS["h100"])
    dry_run(experiment_of("laptop/hash", [*SMALL, ANY, "model.num_experts=64"]), 2, 0, GPUS["h100"])
    assert dry_run(experiment, 2, 0, GPUS["h100"]) == first


def test_dry_run_leaves_the_monitor_of_the_experts_alone(tmp_path):
    """It reads no values, and does not touch the file of a training that may be running."""
    measured = ["+criterion.monitor_interval=1", f"checkpoint.save_dir={tmp_path}"]
    (tmp_path / "experts.jsonl").write_text("kept\n")
    first = dry_run(experiment_of("laptop/switch", [*SMALL, ANY]), 2, 0, GPUS["h100"])
    assert dry_run(experiment_of("laptop/switch", [*SMALL, ANY, *measured]), 2, 0, GPUS["h100"]) == first
    assert (tmp_path / "experts.jsonl").read_text() == "kept\n"


def test_hardware_file_is_read_as_written(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(as_yaml(GPUS["a100"]))
    assert hardware(str(path)) == GPUS["a100"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bandwidht": 3}, "no entry bandwidht"),
        ({"memory": None}, "memory is None"),
        ({"call": -1}, "call is -1; give a number above 0"),
        ({"latency": True}, "latency is True"),
        ({"flops": {"bfloat16": 1}}, "needs the rate of float32"),
        ({"flops": {"float32": "fast"}}, "flops.float32 is fast"),
        ({"cache": 5}, "has a cache and no cached_bandwidth"),
        ({"devices_per_node": 0}, "devices_per_node is 0"),
    ],
)
def test_hardware_file_that_cannot_be_is_one_line(tmp_path, change, words):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(as_yaml(GPUS["a100"])), **change}))
    with pytest.raises(UserError) as refusal:
        hardware(str(path))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "name: x", "\x00"])
def test_no_hardware_file_is_one_line(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refusal:
        hardware(str(path))
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="neither h100, h200, a100 nor a YAML file"):
        hardware("h300")


REPLICAS = ("+model.expert_placement=balanced", "+model.expert_replicas=4")


@pytest.mark.parametrize(
    ("name", "overrides", "ranks", "rank", "words"),
    [
        ("laptop/hash", [], 4, 4, "rank 4 is not one of 4 ranks"),
        ("laptop/hash", ["distributed_training.ddp_backend=pytorch_ddp"], 4, 0, "legacy_ddp, not pytorch_ddp"),
        ("laptop/switch", ["+model.expert_dispatch=fairscale"], 4, 0, "all-to-all, not fairscale"),
        ("laptop/hash", [*REPLICAS], 4, 0, "a dry run does not know --expert-replicas 4; leave it out"),
        ("laptop/hash", ["+model.expert_placement=balanced"], 4, 0, "balanced changes nothing; leave it out, or give"),
        ("routers_2026/expert_choice", [], 4, 0, "a dry run cannot follow --router expert-choice: in it shapes depend"),
        ("laptop/hash", ["+model.expert_parallel_size=3"], 4, 0, "--expert-parallel-size 3 does not divide"),
    ],
)
def test_what_a_dry_run_refuses_is_one_line(name, overrides, ranks, rank, words):
    with pytest.raises(UserError) as refusal:
        dry_run(experiment_of(name, [*SMALL, ANY, *overrides]), ranks, rank, GPUS["h100"])
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert not torch.distributed.is_initialized()


def test_dry_run_needs_a_vocabulary():
    with pytest.raises(UserError, match="states no experiment.vocabulary"):
        dry_run(experiment_of("laptop/hash", [*SMALL, ANY, "experiment.vocabulary=null"]), 2, 0, GPUS["h100"])


@pytest.mark.parametrize(
    ("given", "sentences"),
    [
        (["dataset.max_tokens=200"], 3),
        (["dataset.max_tokens=200", "dataset.batch_size=2"], 2),
        (["dataset.max_tokens=null", "dataset.batch_size=5"], 5),
        (["dataset.max_tokens=10"], 1),
    ],
)
def test_batches_are_those_of_the_configuration(given, sentences):
    """Samples have 64 tokens: as many as both limits allow, and one at least."""
    assert batches_of(experiment_of("laptop/hash", [ANY, *given]).config).sentences == sentences


def test_nodes_share_the_ranks():
    assert in_nodes(GPUS["h100"], 32, 2).devices_per_node == 16
    with pytest.raises(UserError, match="--nodes 3 cannot share 32 ranks evenly; use one of 1, 2, 4, 8, 16, 32"):
        in_nodes(GPUS["h100"], 32, 3)


def test_report_has_the_numbers():
    of, on = dry_run(experiment_of("laptop/hash", [*SMALL, ANY]), 16, 3, GPUS["h100"]), GPUS["h100"]
    said = io.StringIO()
    show(of, "a title", on, 16, 100, Console(file=said, width=120))
    text, total = said.getvalue(), sum(seconds_of(of, on).values())
    for words in ("a title", f"{of.parameters:,} parameters; fits into 80.00 GB", "all-to-all", "Time is an estimate"):
        assert words in text
    assert f"{of.tokens * 16 / total:,.0f}" in text
    assert "does not fit into 1.0 kB" in shown(of, replace(on, memory=1e3))


def shown(of, on):
    said = io.StringIO()
    show(of, "", on, 16, 100, Console(file=said, width=120))
    return said.getvalue()
