"""The model in this process: parameters, padding, incremental decoding, checkpointing, the table's life."""

import copy

import pytest
import torch
from passes import assert_padding_is_not_routed, assert_steps_give_the_full_pass, sample_of, tokens_of
from plugin import build

from fairseq_hash.hashing.builders import balanced_experts, random_experts
from fairseq_hash.moe.dispatch_plan import PlanUnderWay
from fairseq_hash.moe.parameter_counts import count_parameters
from fairseq_hash.moe.routing_stats import RoutingReport

SPARSE = ("--sparse-layers", "0,1", "--num-experts", "4")
ROUTERS = ("hash", "switch", "base", "stablemoe", "random-linear")


def test_without_router_the_parameters_are_those_of_transformer_lm(data):
    torch.manual_seed(1)
    _, _, ours, _ = build(data)
    torch.manual_seed(1)
    sizes = "--decoder-input-dim 16 --decoder-output-dim 16 --dropout 0 --share-decoder-input-output-embed"
    _, _, theirs, _ = build(data, "--arch", "transformer_lm", *sizes.split(), "--decoder-normalize-before")
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    # `_float_tensor` is one uninitialised number that only carries a dtype.
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.endswith("_float_tensor"))


@pytest.mark.parametrize("placement", ["replace", "insert"])
@pytest.mark.parametrize("router", ROUTERS)
def test_dense_parameters_start_as_in_the_dense_model(data, router, placement):
    """One seed: every parameter that both models have is the same, and expert 0 in place of an FFN is that FFN."""
    torch.manual_seed(1)
    dense = build(data)[2].state_dict()
    torch.manual_seed(1)
    _, _, model, _ = build(data, "--router", router, *SPARSE, "--sparse-placement", placement)
    sparse = model.state_dict()
    for name, value in dense.items():
        if name.endswith("_float_tensor"):
            continue
        if placement == "insert":
            # Each decoder layer is followed by a stack: layer 1 has moved to place 2.
            name = name.replace("layers.1.", "layers.2.")
        elif ".fc" in name:
            head, fc, kind = name.rsplit(".", 2)
            assert torch.equal(sparse[f"{head}.sparse.experts.{fc}_{kind}"][0], value)
            continue
        assert torch.equal(sparse[name], value), name


def test_a_hash_layer_with_one_expert_is_the_dense_layer(data):
    """The same logits and gradients to the bit, dropout included."""
    outputs = []
    for arguments in ((), ("--router", "hash", "--sparse-layers", "0,1", "--num-experts", "1")):
        torch.manual_seed(1)
        _, task, model, _ = build(data, "--relu-dropout", "0.2", "--dropout", "0.1", *arguments)
        torch.manual_seed(2)
        logits, _ = model(tokens_of(task))
        logits.square().sum().backward()
        outputs.append((logits, model.decoder.embed_tokens.weight.grad))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize("placement", ["replace", "insert"])
@pytest.mark.parametrize("router", ROUTERS)
def test_padding_is_never_routed_or_counted(data, router, placement):
    _, task, model, _ = build(data, "--router", router, *SPARSE, "--sparse-placement", placement)
    assert_padding_is_not_routed(model.eval(), task)


@pytest.mark.parametrize("placement", ["replace", "insert"])
@pytest.mark.parametrize("router", ["none", *ROUTERS])
def test_incremental_decoding_gives_the_logits_of_the_full_pass(data, router, placement):
    arguments = () if router == "none" else ("--router", router, *SPARSE, "--sparse-placement", placement)
    _, task, model, _ = build(data, *arguments)
    assert_steps_give_the_full_pass(model.eval(), tokens_of(task))


@pytest.mark.parametrize("placement", ["replace", "insert"])
@pytest.mark.parametrize("router", ROUTERS)
def test_activation_checkpointing_changes_nothing(data, router, placement):
    """Loss, reports and every gradient, with random drops, jitter, dropout and auxiliary losses on."""
    results = []
    for extra in ((), ("--checkpoint-activations",)):
        torch.manual_seed(1)
        options = ("--capacity-factor", "1", "--expert-dropout", "0.1", "--dropout", "0.1")
        options += ("--drop-priority", "random")
        options += ("--router-jitter", "0.1") if router == "switch" else ()
        arguments = ("--router", router, *SPARSE, "--sparse-placement", placement, *options, "--z-loss-weight", "0.1")
        _, task, model, criterion = build(data, *arguments, *extra)
        torch.manual_seed(2)
        loss, _, log = criterion(model, sample_of(task))
        loss.backward()
        results.append((loss, log, {name: p.grad for name, p in model.named_parameters()}))
    (loss, log, gradients), (loss_again, log_again, gradients_again) = results
    torch.testing.assert_close(loss, loss_again, rtol=0, atol=0)
    assert log.keys() == log_again.keys() and len(log) == 7
    for key in log:
        assert torch.equal(torch.as_tensor(log[key]), torch.as_tensor(log_again[key])), key
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


def test_two_forwards_before_a_backward(data):
    """The second forward pass does not disturb what the first one's recomputation needs."""
    gradients = []
    for interleaved in (False, True):
        torch.manual_seed(1)
        _, task, model, _ = build(data, "--router", "hash", *SPARSE, "--checkpoint-activations")
        first, second = (model(tokens_of(task, seed=seed))[0] if interleaved else None for seed in (1, 2))
        if interleaved:
            (first.sum() + 2 * second.sum()).backward()
        else:
            model(tokens_of(task, seed=1))[0].sum().backward()
            (2 * model(tokens_of(task, seed=2))[0]).sum().backward()
        gradients.append(model.decoder.layers[0].sparse.experts.fc1_weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_the_table_comes_from_the_dictionary_and_stays(data, tmp_path):
    """Balanced by the dictionary's counts, and saved: evaluation takes it, training must have the same."""
    _, task, model, _ = build(data, "--router", "hash", *SPARSE)
    dictionary = task.source_dictionary
    expected = torch.from_numpy(balanced_experts(dictionary.count, 4))
    assert torch.equal(model.decoder.hash_tables[0].expert, expected)
    assert "decoder.hash_tables.0.expert" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    options = ("--router", "hash", *SPARSE, "--hash-table", "random")
    _, _, other, _ = build(data, *options)
    assert not torch.equal(other.decoder.hash_tables[0].expert, expected)
    with pytest.raises(SystemExit, match="has hash table .*, this model has .*; write the checkpoint's "):
        other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    _, _, other, _ = build(data, *options, "--hash-table", "a file that is no longer there", for_evaluation=True)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other.decoder.hash_tables[0].expert, expected)
    token_BL = tokens_of(task)
    torch.testing.assert_close(other.eval()(token_BL)[0], model.eval()(token_BL)[0], rtol=0, atol=0)
    table = copy.deepcopy(model).half().decoder.hash_tables[0].expert
    assert table.dtype == torch.int64 and torch.equal(table, expected)


def test_hash_routes_follow_the_table(data):
    """Each report counts the tokens by the table, and a token's route does not depend on its position."""
    _, task, model, _ = build(data, "--router", "hash", *SPARSE, "--hash-table", "random", "--hash-seed", "3")
    token_BL = tokens_of(task)
    table = torch.from_numpy(random_experts(len(task.source_dictionary), 4, seed=3)).flatten()
    expected = torch.bincount(table[token_BL.flatten()], minlength=4).float()
    _, extra = model(token_BL)
    assert set(extra["routing"]) == {(0, "hash"), (1, "hash")}
    for report in extra["routing"].values():
        assert torch.equal(RoutingReport(report).tokens_per_expert_E, expected)


@pytest.mark.parametrize(("per_layer", "plans"), [((), 1), (("--hash-per-layer",), 2)])
def test_layers_with_one_table_share_route_and_report(data, monkeypatch, per_layer, plans):
    """Two layers and one table: one plan and one report a forward pass, backward included."""
    _, task, model, _ = build(data, "--router", "hash", *SPARSE, *per_layer)
    made = []
    of = RoutingReport.of
    monkeypatch.setattr(RoutingReport, "of", lambda *args, **more: made.append("report") or of(*args, **more))
    begin = PlanUnderWay.__init__
    monkeypatch.setattr(PlanUnderWay, "__init__", lambda *args, **named: made.append("plan") or begin(*args, **named))
    model(tokens_of(task))[0].sum().backward()
    assert sorted(made) == ["plan"] * plans + ["report"] * plans


@pytest.mark.parametrize("placement", ["replace", "insert"])
def test_recomputed_hidden_layers_change_nothing(data, placement):
    results = []
    for recompute in ((), ("--recompute-hidden",)):
        torch.manual_seed(1)
        _, task, model, _ = build(data, "--router", "hash", *SPARSE, "--sparse-placement", placement, *recompute)
        torch.manual_seed(2)
        logits, _ = model(tokens_of(task))
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("router", ROUTERS)
def test_parameters_counted(data, router):
    """Total and active, by arithmetic: an expert has D x F + F + F x D + D parameters."""
    dense = sum(p.numel() for p in build(data)[2].parameters())
    _, _, model, _ = build(data, "--router", router, *SPARSE)
    expert = 16 * 32 + 32 + 32 * 16 + 16
    of_router = 0 if router in ("hash", "random-linear") else 2 * 4 * 16
    if router == "stablemoe":  # a narrow embedding of 64 symbols, and its centroids
        of_router += 2 * (64 + 4) * 50
    assert count_parameters(model) == (dense + 2 * 3 * expert + of_router, dense + of_router)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", ["replace", "insert"])
@pytest.mark.parametrize("router", ROUTERS)
def test_half_precision_is_close_to_fp32(data, router, placement, precision):
    """Forward and backward in half precision; the tolerance is some rounding steps of the type."""
    torch.manual_seed(1)
    _, task, model, _ = build(data, "--router", router, *SPARSE, "--sparse-placement", placement)
    model.eval()  # BASE routes greedily: in training a rounding step may change the whole assignment
    token_BL = tokens_of(task)
    exact, _ = model(token_BL)
    low = copy.deepcopy(model).to(precision)
    logits, extra = low(token_BL)
    assert logits.dtype == precision
    logits.float().square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in low.parameters())
    assert all(report.dtype == torch.float32 for report in extra["routing"].values())
    # A token near the border of two experts may change sides: allow one in twenty to be off.
    error = (logits.float() - exact).abs().amax(dim=-1) / exact.abs().amax()
    assert (error < 16 * torch.finfo(precision).eps).float().mean() >= 0.95
