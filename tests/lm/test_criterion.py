"""The criterion: what it adds, that its weights do not depend on batching, and what it logs."""

import json
import math

import pytest
import torch
from fairseq.logging import metrics
from fairseq.logging.progress_bar import format_stat
from passes import sample_of
from plugin import build
from torch import nn

from fairseq_hash.lm.criterion import HashMoECriterion
from fairseq_hash.moe.routers.switch import SwitchStatistics
from fairseq_hash.moe.routing_stats import RoutingReport

SWITCH = ("--router", "switch", "--sparse-layers", "0,1", "--num-experts", "4")
WEIGHTS = ("--load-balance-weight", "0.5", "--z-loss-weight", "0.25")


def logged(outputs):
    """What fairseq shows for these logging outputs."""
    metrics.reset()
    with metrics.aggregate(new_root=True) as shown:
        for group in outputs:
            HashMoECriterion.reduce_metrics(group)
    return shown.get_smoothed_values()


def test_loss_is_cross_entropy_plus_weighted_means(data):
    """By the definition: sum over tokens of -log p, plus tokens x (weights x the layers' losses)."""
    _, task, model, criterion = build(data, *SWITCH, *WEIGHTS)
    sample = sample_of(task, 3)
    loss, sample_size, log = criterion(model, sample)
    logits, extra = model(**sample["net_input"])
    target = sample["target"].flatten()
    cross_entropy = nn.functional.cross_entropy(logits.double().flatten(0, 1), target, reduction="sum")
    auxiliary = 0.0
    for sums in extra["routing"].values():
        report = RoutingReport(sums, SwitchStatistics)
        auxiliary += 0.5 * report.mean(report.total("balance_loss")) + 0.25 * report.mean(report.total("z_loss"))
    assert sample_size == 36 and auxiliary > 0.5
    torch.testing.assert_close(loss.double(), cross_entropy + 36 * auxiliary, rtol=1e-6, atol=0)
    torch.testing.assert_close(log["nll_loss"].double(), cross_entropy, rtol=1e-6, atol=0)
    shown = logged([[log]])
    assert shown["nll_loss"] == pytest.approx(cross_entropy.item() / 36 / math.log(2), abs=6e-4)
    assert shown["loss"] == pytest.approx(loss.item() / 36 / math.log(2), abs=6e-4)
    # ppl is of the cross-entropy alone.
    assert shown["ppl"] == pytest.approx(math.exp(cross_entropy.item() / 36), rel=1e-3)


def test_the_logged_cross_entropy_is_one_per_token(data):
    """Also where the loss is divided by the number of sentences."""
    _, task, model, criterion = build(data, *SWITCH, "--sentence-avg")
    _, sample_size, log = criterion(model, sample_of(task, 3))
    assert (sample_size, log["ntokens"]) == (3, 36)
    assert logged([[log]])["nll_loss"] == pytest.approx(log["nll_loss"].item() / 36 / math.log(2), abs=6e-4)


def test_without_sparse_layers_it_is_fairseqs_cross_entropy(data):
    from fairseq.criterions.cross_entropy import CrossEntropyCriterion

    for arguments in ((), ("--router", "hash", "--sparse-layers", "0")):
        _, task, model, criterion = build(data, *arguments)
        sample = sample_of(task, 3)
        theirs = CrossEntropyCriterion(task, sentence_avg=False)
        assert torch.equal(criterion(model, sample)[0], theirs(model, sample)[0])


def test_validation_adds_no_auxiliary_loss(data):
    _, task, model, criterion = build(data, *SWITCH, *WEIGHTS)
    criterion.eval()
    model.eval()
    loss, _, log = criterion(model, sample_of(task, 3))
    assert torch.equal(loss, log["nll_loss"])
    assert logged([[log]])["layer0_balance_loss"] > 0  # it is still reported


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_the_auxiliary_weight_does_not_depend_on_batching(data, sentence_avg):
    """Gradient of one batch, against the same batch given twice by accumulation or as two ranks.

    Repeating a batch changes no mean, so after division by the sample size the gradients must agree: the auxiliary
    losses may not count once a batch or once a rank.
    """
    arguments = (*SWITCH, *WEIGHTS, *(("--sentence-avg",) if sentence_avg else ()))
    _, task, model, criterion = build(data, *arguments)
    weight = model.decoder.layers[0].sparse.router.weight

    def gradient(batches):
        model.zero_grad()
        sizes = 0
        for rows in batches:
            sample = sample_of(task, 2)
            for key in ("src_tokens", "src_lengths"):
                sample["net_input"][key] = sample["net_input"][key].repeat_interleave(rows, 0)
            sample["target"] = sample["target"].repeat_interleave(rows, 0)
            sample["ntokens"] *= rows
            loss, sample_size, _ = criterion(model, sample)
            loss.backward()
            sizes += sample_size
        return weight.grad / sizes

    once = gradient([1])
    for batches in ([1, 1], [2], [1, 3]):
        # Sums in another order.
        torch.testing.assert_close(gradient(batches), once, rtol=1e-4, atol=1e-7)


def test_logging_outputs_add_up_over_ranks_and_batches(data):
    """Three samples reduced one by one, at once, or summed first as fairseq does over ranks: the same figures."""
    _, task, model, criterion = build(data, *SWITCH, *WEIGHTS, "--capacity-factor", "0.8", "--log-expert-loads")
    outputs = [criterion(model, sample_of(task, rows, seed=rows))[2] for rows in (1, 2, 5)]
    summed = {key: sum(torch.as_tensor(log[key]).double() for log in outputs) for key in outputs[0]}
    one_by_one, at_once, over_ranks = logged([[o] for o in outputs]), logged([outputs]), logged([[summed]])
    assert one_by_one.keys() == at_once.keys() == over_ranks.keys()
    for key, value in at_once.items():
        # Rounded to five decimals, or to three for fairseq's own.
        assert torch.as_tensor(one_by_one[key]).tolist() == pytest.approx(torch.as_tensor(value).tolist(), abs=2e-3)
        assert torch.as_tensor(over_ranks[key]).tolist() == pytest.approx(torch.as_tensor(value).tolist(), abs=2e-3)


def test_layer_statistics_equal_their_definitions(data):
    """Against plain Python over the routed tokens of two batches."""
    _, task, model, criterion = build(data, *SWITCH, *WEIGHTS, "--capacity-factor", "0.8", "--log-expert-loads")
    samples = [sample_of(task, rows, seed=rows) for rows in (2, 5)]
    chosen, entropies, balances, zs, dropped = [], [], [], [], 0
    router = model.decoder.layers[1].sparse.router
    seen = []
    router.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].detach(), output)))
    outputs = [criterion(model, sample)[2] for sample in samples]
    import reference

    for x_TD, _ in seen:
        experts, _, balance, z, entropy = reference.switch_route(list(x_TD.double()), router.weight.detach().double())
        dropped += reference.kept_under_capacity(experts, 4, 0.8).count(False)
        chosen += experts
        entropies += [entropy.item()] * len(experts)
        balances += [balance.item()] * len(experts)
        zs += [z.item()] * len(experts)
    shown = logged([outputs])
    count = len(chosen)
    loads = [chosen.count(e) / count * 4 for e in range(4)]
    spread = math.sqrt(sum((load - 1) ** 2 for load in loads) / 4)
    expected = {
        "load_max": max(loads),
        "load_min": min(loads),
        "load_cv": spread,
        "dropped": dropped / count,
        "router_entropy": sum(entropies) / count,
        "balance_loss": sum(balances) / count,
        "z_loss": sum(zs) / count,
    }
    assert dropped > 0
    for name, value in expected.items():
        assert shown[f"layer1_{name}"] == pytest.approx(value, abs=2e-5), name
    assert shown["layer1_load"].tolist() == pytest.approx([load / 4 for load in loads], abs=1e-5)
    # Lists and numbers reach the JSON log; TensorBoard takes the numbers.
    json.dumps({key: format_stat(value) for key, value in shown.items()})
    assert all(isinstance(shown[f"layer1_{name}"], float) for name in expected)


def test_a_hash_layer_has_no_router_statistics(data):
    _, task, model, criterion = build(data, "--router", "hash", "--sparse-layers", "1")
    shown = logged([[criterion(model, sample_of(task, 2))[2]]])
    layer = {key for key in shown if key.startswith("layer")}
    assert layer == {"layer1_load_max", "layer1_load_min", "layer1_load_cv", "layer1_dropped"}


def test_meters_survive_a_checkpoint(data, tmp_path):
    """fairseq saves its meters; a weights-only load must restore ours."""
    _, task, model, criterion = build(data, *SWITCH)
    log = criterion(model, sample_of(task, 2))[2]
    metrics.reset()
    with metrics.aggregate("train"):
        HashMoECriterion.reduce_metrics([log])
        torch.save(metrics.state_dict(), tmp_path / "meters.pt")
    before = metrics.get_smoothed_values("train")
    metrics.reset()
    metrics.load_state_dict(torch.load(tmp_path / "meters.pt", weights_only=True))
    with metrics.aggregate("train"):
        HashMoECriterion.reduce_metrics([{**log, "_layer0|switch": torch.zeros_like(log["_layer0|switch"])}])
    after = metrics.get_smoothed_values("train")
    assert after["layer0_load_max"] == before["layer0_load_max"] > 1
