"""The options that make routers comparable, in the model: sizes, scales, drops, the count of `</s>`, oracles."""

import pytest
import reference
import torch
from passes import sample_of, tokens_of
from plugin import build

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.parameter_counts import count_parameters
from fairseq_hash.moe.routing_stats import RoutingReport
from fairseq_hash.table_tools import build_table
from fairseq_hash.table_tools.build_options import Options

SPARSE = ("--sparse-layers", "0,1", "--num-experts", "4")
HASH = ("--router", "hash", *SPARSE)
END = 2  # </s>


def outputs(data, *arguments):
    """Return what each sparse layer adds to the same activations, and its gradients."""
    torch.manual_seed(1)
    _, task, model, _ = build(data, *arguments)
    context = model.decoder.routing_context(tokens_of(task))
    x_LBD = torch.randn(12, 3, 16, generator=torch.Generator().manual_seed(2))
    found = []
    for layer in model.modules():
        if isinstance(layer, SparseLayer):
            y_LBD, _ = layer(x_LBD, context)
            found += [y_LBD, *torch.autograd.grad(y_LBD.sum(), [*layer.experts.parameters()])]
    return found


@pytest.mark.parametrize("more", [(), ("--multi-hash", "2")])
def test_a_scale_multiplies_what_one_expert_returns(data, more):
    """By a power of two, so that nothing is rounded."""
    plain, scaled = outputs(data, *HASH, *more), outputs(data, *HASH, *more, "--hash-scale", "0.125")
    assert len(plain) == 2 * 5
    for value, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, value / 8, rtol=1e-6, atol=1e-8)


def test_a_norm_of_the_experts_is_one_for_each_layer(data):
    """It is dense, and it is trained."""
    _, _, plain, _ = build(data, *HASH)
    _, task, model, criterion = build(data, *HASH, "--expert-layer-norm")
    assert [size - 2 * 2 * 16 for size in count_parameters(model)] == list(count_parameters(plain))
    criterion(model, sample_of(task))[0].backward()
    norms = [module.norm for module in model.modules() if isinstance(module, SparseLayer)]
    assert all(norm.weight.grad.abs().max() > 0 and not hasattr(norm.weight, "expert") for norm in norms)


@pytest.mark.parametrize("router", ["hash", "switch"])
def test_drops_are_random_in_training_only(data, router):
    """Each batch draws another order; evaluation keeps what comes first, as it does without the option."""
    arguments = ("--router", router, *SPARSE, "--capacity-factor", "0.5", "--eval-capacity-factor", "0.5")

    def passes(*more):
        torch.manual_seed(1)
        _, task, model, _ = build(data, *arguments, *more)
        token_BL = tokens_of(task)
        torch.manual_seed(2)
        first, second = model(token_BL), model(token_BL)
        dropped = [RoutingReport(sums).dropped for sums in first[1]["routing"].values()]
        return first[0], second[0], model.eval()(token_BL)[0], dropped

    first, second, evaluated, dropped = passes("--drop-priority", "random")
    by_position = passes()
    assert torch.equal(by_position[0], by_position[1]) and torch.equal(evaluated, by_position[2])
    assert not torch.equal(first, second) and not torch.equal(first, by_position[0])
    assert dropped[0] == by_position[3][0] > 0


def test_line_ends_are_counted(data, tmp_path):
    """Once for each line of the training text, as `tables build --text` counts them; without the option as 1."""
    lines = len((data.parent / "train.txt").read_text().splitlines())
    for count, more in ((1, ()), (lines, ("--hash-count-eos",))):
        _, task, model, _ = build(data, *HASH, *more)
        counts = list(task.source_dictionary.count)
        assert counts[END] == 1
        counts[END] = count
        assert model.decoder.hash_tables[0].expert[:, 0].tolist() == reference.balanced_hash(counts, 4)
    built = build_table.build(Options(dictionary=data / "dict.txt", num_experts=4, text=data))
    assert built.count_H[END:].tolist() == [lines, 0, *counts[4:]]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "dict.txt").write_bytes((data / "dict.txt").read_bytes())
    with pytest.raises(SystemExit, match=r"^fairseq_hash: --hash-count-eos counts .*bare has no binarized train; "):
        build(tmp_path / "bare", *HASH, "--hash-count-eos")


def test_base_evaluated_balanced_is_an_oracle(data, caplog):
    """Its perplexity has another name, and it generates nothing."""
    _, task, model, criterion = build(data, "--router", "base", *SPARSE, "--base-evaluation", "balanced")
    assert "--base-evaluation balanced sees the next token" in caplog.text
    model.eval()
    log = criterion.eval()(model, sample_of(task))[2]
    assert log["_is_oracle"] == 1
    for sums in model(tokens_of(task))[1]["routing"].values():
        assert RoutingReport(sums).tokens_per_expert_E.tolist() == [9] * 4
    with pytest.raises(SystemExit, match="balanced sees the next token, which generation does not have"):
        model.decoder(tokens_of(task)[:, :1], incremental_state={})
    _, task, model, criterion = build(data, "--router", "base", *SPARSE)
    assert "_is_oracle" not in criterion.eval()(model.eval(), sample_of(task))[2]
