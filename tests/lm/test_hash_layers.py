"""Hash layers in the model: features, K experts, MultiHash, tables and routers of their own, oracles."""

import numpy as np
import pytest
import recorded
import torch
from hash_variants import HASH, K3, VARIANTS, words_of
from passes import assert_padding_is_not_routed, assert_steps_give_the_full_pass, sample_of, tokens_of
from plugin import build, evaluate, records, train

from fairseq_hash import hashing
from fairseq_hash.hashing.builders import random_experts
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.parameter_counts import count_parameters
from fairseq_hash.moe.routing_stats import RoutingReport

ALL = [*VARIANTS, "spread", "word"]


def randomise(model):
    """Move learned weights of experts away from zero, where they all weigh the same."""
    for layer in model.modules():
        if isinstance(layer, SparseLayer) and layer.router is not None:
            torch.nn.init.normal_(layer.router.weight, std=0.5)


@pytest.mark.parametrize("variant", ALL)
def test_step_by_step_gives_the_logits_of_the_full_pass(data, tmp_path, variant):
    _, task, model, _ = build(data, *words_of(variant, data, tmp_path))
    randomise(model)
    assert_steps_give_the_full_pass(model.eval(), tokens_of(task))


@pytest.mark.parametrize("variant", ALL)
def test_padding_is_never_routed_or_counted(data, tmp_path, variant):
    _, task, model, _ = build(data, *words_of(variant, data, tmp_path))
    randomise(model)
    assert_padding_is_not_routed(model.eval(), task)


@pytest.mark.parametrize("variant", ALL)
def test_every_variant_trains_is_saved_and_is_evaluated_alike(data, tmp_path, variant):
    """One step; then the state alone, in a model built for evaluation without the table's file, gives the same."""
    arguments = words_of(variant, data, tmp_path)
    torch.manual_seed(1)
    _, task, model, criterion = build(data, *arguments)
    token_BL = tokens_of(task)
    loss, _, log = criterion(model, sample_of(task))
    loss.backward()
    if "switch" not in variant:  # a hash layer adds nothing to the objective
        assert loss == log["nll_loss"]
    learned = [p for name, p in model.named_parameters() if ".sparse." in name]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    (tmp_path / "table").unlink(missing_ok=True)
    _, _, other, _ = build(data, *arguments, for_evaluation=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(token_BL)[0], model(token_BL)[0])


@pytest.mark.parametrize("variant", ["learned", "swiglu", "multi-hash", "spread"])
def test_activation_checkpointing_and_half_precision(data, tmp_path, variant):
    """The same gradients with recomputation; in bf16 the same up to some of its rounding steps."""
    found = []
    for extra in ((), ("--checkpoint-activations",)):
        torch.manual_seed(1)
        _, task, model, _ = build(data, *words_of(variant, data, tmp_path), *extra)
        torch.manual_seed(2)
        randomise(model)
        logits, _ = model(tokens_of(task))
        logits.square().sum().backward()
        found.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-6, atol=1e-6)
    low, _ = model.bfloat16()(tokens_of(task))
    assert low.dtype == torch.bfloat16
    error = (low.float() - found[0][0]).abs().amax() / found[0][0].abs().amax()
    assert error < 16 * torch.finfo(torch.bfloat16).eps


def test_k_experts_are_the_weighted_sum_of_single_ones(data):
    """Each expert's output by itself, in a layer of one expert a token, adds up to the layer's."""
    torch.manual_seed(1)
    _, task, model, _ = build(data, *HASH, *K3, "--hash-scale", "1.5")
    layer = model.decoder.layers[0].sparse
    token_BL = tokens_of(task)
    table = torch.from_numpy(random_experts(len(task.source_dictionary), 4, 3, seed=42))
    context = model.decoder.routing_context(token_BL)
    x_LBD = torch.randn(12, 3, 16)
    y_LBD, packed = layer(x_LBD, context)
    expected = torch.zeros_like(x_LBD)
    for batch in range(3):
        for place in range(12):
            for expert in table[token_BL[batch, place]].tolist():
                rows = [1 if e == expert else 0 for e in range(4)]
                expected[place, batch] += 0.5 * layer.experts(x_LBD[place, batch].unsqueeze(0), rows)[0]
    torch.testing.assert_close(y_LBD, expected, rtol=1e-5, atol=1e-6)
    counts = torch.bincount(table[token_BL].flatten(), minlength=4)
    assert RoutingReport(packed).tokens_per_expert_E.tolist() == counts.tolist()


def test_multi_hash_of_one_is_the_plain_layer_and_of_more_has_its_parameters(data):
    results = []
    for extra in ((), ("--multi-hash", "1"), ("--multi-hash", "4")):
        torch.manual_seed(1)
        _, task, model, _ = build(data, *HASH, *extra)
        logits = model(tokens_of(task))[0]
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((logits, gradients, count_parameters(model)))
    plain, one, four = results
    assert torch.equal(plain[0], one[0]) and not torch.equal(plain[0], four[0])
    assert all(torch.equal(plain[1][name], one[1][name]) for name in plain[1])
    assert plain[2] == one[2] == four[2]
    assert {name: g.shape for name, g in four[1].items()} == {name: g.shape for name, g in plain[1].items()}


def test_multi_hash_takes_each_segment_from_its_own_table(data):
    """Experts that return the number of the expert in every hidden unit show whose segment is where."""
    _, task, model, _ = build(data, *HASH, "--multi-hash", "2", "--activation-fn", "relu")
    layer = model.decoder.layers[0].sparse
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.zero_()
        layer.experts.fc1_bias.copy_(torch.arange(1.0, 5).unsqueeze(1).expand(4, 32))
        layer.experts.fc2_weight[:, 0, :16] = 1.0 / 16  # output 0 is the first segment's expert, output 1 the second's
        layer.experts.fc2_weight[:, 1, 16:] = 1.0 / 16
        layer.experts.fc2_bias[:, 2] = torch.arange(1.0, 5)  # output 2 is the mean of both
    token_BL = tokens_of(task)
    y_LBD, packed = layer(torch.randn(12, 3, 16), model.decoder.routing_context(token_BL))
    columns = [random_experts(len(task.source_dictionary), 4, seed=42 + n) for n in range(2)]
    table = torch.from_numpy(np.concatenate(columns, axis=1))
    expert_LBN = table[token_BL.t()].float() + 1
    torch.testing.assert_close(y_LBD[..., :2], expert_LBN)
    torch.testing.assert_close(y_LBD[..., 2], expert_LBN.mean(dim=-1))
    demand = torch.bincount(table[token_BL].flatten(), minlength=4)
    assert RoutingReport(packed).tokens_per_expert_E.tolist() == demand.tolist()


def test_layers_have_tables_and_routers_of_their_own(data, tmp_path):
    _, task, model, _ = build(data, *HASH, "--hash-per-layer")
    one, other = model.decoder.hash_tables
    assert not torch.equal(one.expert, other.expert)
    assert np.array_equal(one.expert, random_experts(len(task.source_dictionary), 4, seed=42))
    token_BL = tokens_of(task)
    reports = model(token_BL)[1]["routing"]
    for (_, packed), table in zip(sorted(reports.items()), (one, other), strict=True):
        demand = torch.bincount(table.expert[token_BL].flatten(), minlength=4).float()
        assert torch.equal(RoutingReport(packed).tokens_per_expert_E, demand)

    known = task.source_dictionary.symbols, task.source_dictionary.count
    for seed in (1, 2):
        table = hashing.build_table("random", *known, hashing.TableShape(4), seed)
        hashing.save_table(table, tmp_path / f"{seed}.safetensors")
    _, _, model, _ = build(data, *HASH, "--hash-table", f"{tmp_path}/1.safetensors,{tmp_path}/2.safetensors")
    expected = [random_experts(len(known[0]), 4, seed=seed) for seed in (1, 2)]
    assert all(np.array_equal(t.expert, e) for t, e in zip(model.decoder.hash_tables, expected, strict=True))

    _, _, model, _ = build(data, "--router", "switch,hash", "--sparse-layers", "0,1", "--num-experts", "4")
    assert set(model(token_BL)[1]["routing"]) == {(0, "switch"), (1, "hash")}
    assert len(model.decoder.hash_tables) == 1


def test_parameters_that_a_token_uses(data):
    """K experts, the shared one, and the dense part; by arithmetic."""
    dense = sum(p.numel() for p in build(data)[2].parameters())
    expert, gated = 16 * 32 + 32 + 32 * 16 + 16, 3 * 16 * 32
    without_ffn = dense - 2 * expert
    for arguments, size, active in (
        (K3, expert, 3 * expert),
        (("--shared-expert",), expert, 2 * expert),
        ((*K3, "--expert-form", "swiglu", "--shared-expert"), gated, 4 * gated),
    ):
        _, _, model, _ = build(data, *HASH, *arguments)
        shared = size if "--shared-expert" in arguments else 0
        assert count_parameters(model) == (without_ffn + 2 * (4 * size + shared), without_ffn + 2 * active)


def test_an_oracle_is_named_as_one_and_generates_nothing(data, tmp_path):
    """In the log of its training, in its evaluation, and in one line where it is to generate."""
    options = (*HASH, "--hash-feature", "future")
    done = train(data, tmp_path, *options)
    assert all("oracle_ppl" in record and "ppl" not in record for record in records(done, "train_inner"))
    assert all("valid_oracle_ppl" in record and "valid_ppl" not in record for record in records(done, "valid"))
    done = evaluate(data, tmp_path / "checkpoint_best.pt")
    said = done.stdout + done.stderr
    assert "Perplexity of an oracle, which sees the next token: " in said and "Perplexity: " not in said
    with pytest.raises(SystemExit, match="an oracle has no such perplexity; use loss, or oracle_ppl"):
        recorded.make_trainer(data, (*options, "--best-checkpoint-metric", "ppl"))
    _, task, model, _ = build(data, *HASH, "--hash-feature", "future")
    with pytest.raises(SystemExit, match="future sees the next token, which generation does not have"):
        model.decoder(tokens_of(task)[:, :1], incremental_state={})
    # The table sees the next token: whatever stands in place of it changes this token's route.
    token_BL = tokens_of(task)
    row_BL = model.decoder.hash_tables[0].rows(token_BL, 1, None)
    assert torch.equal(row_BL[:, :-1], token_BL[:, 1:])


def test_a_model_that_predicts_gives_the_keys(data, tmp_path):
    """A trained dense model's most probable next token, in training, evaluation and step by step."""
    train(data, tmp_path / "dense", "--max-update", "2")
    path = tmp_path / "dense" / "checkpoint_last.pt"
    arguments = (*HASH, "--hash-feature", "predicted", "--hash-predictor", path)
    _, task, model, _ = build(data, *arguments)
    assert not any("predictor" in name for name, _ in model.named_parameters())
    model.eval()
    token_BL = tokens_of(task)
    predictor = model.decoder.predictor.model
    predicted_BL = predictor(token_BL)[0].argmax(dim=-1)
    context = model.decoder.routing_context(token_BL)
    table = model.decoder.hash_tables[0].expert
    assert torch.equal(context.hash_routes[0].assignment.expert_TK, table[predicted_BL.t().flatten()])
    assert_steps_give_the_full_pass(model, token_BL)

    done = train(data, tmp_path / "hash", *arguments, "--max-update", "2")
    assert len(records(done, "train_inner")) == 2
    done = evaluate(data, tmp_path / "hash" / "checkpoint_best.pt")
    assert "Perplexity: " in done.stdout + done.stderr
    train(data, tmp_path / "other", "--max-update", "3", "--seed", "9")
    other = tmp_path / "other" / "checkpoint_last.pt"
    overrides = ("--model-overrides", str({"hash_predictor": str(other)}))
    done = evaluate(data, tmp_path / "hash" / "checkpoint_best.pt", *overrides, check=False)
    assert done.returncode and "it was trained with --hash-predictor " in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hash-feature", "tokn"), "--hash-feature tokn is unknown"),
        (("--hash-feature", "ngram"), "--hash-length 0 does not go with --hash-feature ngram; give 2 to 64 tokens"),
        (("--hash-feature", "word"), "--hash-feature word needs a table file, not random"),
        (("--hash-feature", "bigram", "--hash-table", "balanced"), "the dictionary counts tokens; use random"),
        (("--hash-feature", "predicted"), "go together; give both or none"),
        (("--hash-predictor", "x.pt"), "go together; give both or none"),
        (("--hash-feature", "predicted", "--hash-predictor", "x.pt"), "--hash-predictor x.pt cannot be used: "),
        (("--experts-per-token", "5"), "--experts-per-token 5 is out of range; give 1 to 4"),
        (("--experts-per-token", "0"), "--experts-per-token 0 is out of range"),
        (("--hash-weights", "learned"), "--hash-weights learned needs several experts per token"),
        ((*K3, "--hash-scale", "0"), "--hash-scale 0.0 is out of range"),
        ((*K3, "--hash-score", "relu"), "--hash-score relu is unknown"),
        ((*K3, "--multi-hash", "2"), "do not go together"),
        (("--multi-hash", "0"), "--multi-hash 0 is out of range"),
        (("--multi-hash", "5"), "5"),
        (
            ("--multi-hash", "2", "--hash-table", "modulo"),
            "--multi-hash 2 needs a builder that can make different tables; use balanced, scattered or random, "
            "not modulo",
        ),
        (("--multi-hash", "2", "--expert-form", "swiglu"), "needs --expert-form plain"),
        (("--swiglu-limit", "2"), "--swiglu-limit 2.0 needs --expert-form swiglu"),
        (("--shared-expert", "--sparse-placement", "insert"), "--shared-expert needs experts in place of an FFN"),
        (("--router", "hash,hash,switch"), "names 3 routers, --sparse-layers 0,1 2 layers"),
        (("--router", "hash,none"), "none cannot be mixed with other routers"),
        (("--router", "hash,swich"), "--router swich is unknown"),
        (("--router", "switch", *K3), "(--router hash), and does nothing here, with --router switch"),
        (("--hash-table", "random,random,random"), "names 3 tables for 2 hash layers"),
        (("--hash-per-layer", "--hash-table", "modulo"), "--hash-per-layer draws tables"),
    ],
)
def test_bad_options_end_in_one_line(data, arguments, message):
    with pytest.raises(SystemExit) as error:
        build(data, *HASH, *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_tables_that_do_not_fit_are_refused(data, tmp_path):
    _, task, _, _ = build(data)
    known = task.source_dictionary.symbols, task.source_dictionary.count
    shapes = {
        "two": (hashing.TableShape(4, 2), "is for --experts-per-token 2"),
        "multi": (hashing.TableShape(4, 2, is_multi_hash=True), "is for --multi-hash 2"),
        "previous": (
            hashing.TableShape(4, feature=hashing.Feature("previous")),
            "is a table of previous, but the model",
        ),
    }
    ngram = hashing.TableShape(4, feature=hashing.Feature("ngram", 3), num_keys=64)
    shapes["ngram"] = ngram, "give --hash-feature ngram --hash-length 3"
    for name, (shape, message) in shapes.items():
        hashing.save_table(hashing.build_table("random", *known, shape, 0), tmp_path / name)
        with pytest.raises(SystemExit, match=message):
            build(data, *HASH, "--hash-table", tmp_path / name)
    build(data, *HASH, "--hash-table", tmp_path / "multi", "--multi-hash", "2")
    build(data, *HASH, "--hash-table", tmp_path / "ngram", "--hash-feature", "ngram", "--hash-length", "3")
