"""Hash weights and gated experts equal the hash layers of transformers' DeepSeek-V4: outputs and all gradients.

Runs where `transformers` is installed and has that model: pip install -e '.[peers]'.
"""

import pytest
import torch
from torch import nn

from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.experts import GatedFeedForward
from fairseq_hash.moe.hash_weights import SCORES, HashWeights
from fairseq_hash.moe.token_dispatcher import combine, dispatch
from fairseq_hash.parallel.groups import ExpertParallel

MODULE, WHY = "transformers.models.deepseek_v4.modeling_deepseek_v4", "needs transformers with DeepSeek-V4"
theirs = pytest.importorskip(MODULE, reason=WHY, exc_type=ImportError)

WIDTH, HIDDEN, EXPERTS, VOCABULARY, SCALE = 16, 24, 8, 40, 1.5
LIMIT = 0.8  # of values up to about 4
# fp32 on both sides: sums of some tens of products in another order, then quotients of scores.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def build_theirs(score, choices):
    """One of their sparse blocks with random weights and a random table."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "moe_intermediate_size": HIDDEN, "num_hidden_layers": 1}
    sizes |= {"n_routed_experts": EXPERTS, "num_experts_per_tok": choices}
    types = {"mlp_layer_types": ["hash_moe"], "layer_types": ["heavily_compressed_attention"]}
    # Their table of activations knows no softmax, which their configuration names: it is put in below.
    function = {"softmax": "sigmoid", "sqrt-softplus": "sqrtsoftplus"}.get(score, score)
    scales = {"scoring_func": function, "routed_scaling_factor": SCALE, "swiglu_limit": LIMIT}
    config = theirs.DeepseekV4Config(**sizes, **types, **scales, experts_implementation="eager")
    block = theirs.DeepseekV4SparseMoeBlock(config, 0)
    if score == "softmax":
        block.gate.score_fn = nn.Softmax(dim=-1)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    # The last expert is nobody's.
    block.gate.tid2eid.copy_(torch.stack([torch.randperm(EXPERTS - 1)[:choices] for _ in range(VOCABULARY)]))
    return block


def copy_into(ours, **weights):
    with torch.no_grad():
        for name, weight in weights.items():
            ours.get_parameter(name).copy_(weight)
    return ours


def build_ours(block, score):
    """The same weights in our modules: hash weights, experts, and the shared expert as experts of one."""
    gate = copy_into(HashWeights(WIDTH, EXPERTS, score, SCALE), weight=block.gate.weight)
    routed = {"gate_up_weight": block.experts.gate_up_proj, "down_weight": block.experts.down_proj}
    experts = copy_into(GatedFeedForward(range(EXPERTS), WIDTH, HIDDEN, LIMIT, 0.0, (0,)), **routed)
    down = block.shared_experts.down_proj.weight.unsqueeze(0)
    alone = {"gate_up_weight": shared_gate_up(block, "weight"), "down_weight": down}
    return gate, experts, copy_into(GatedFeedForward([0], WIDTH, HIDDEN, LIMIT, 0.0, (1,)), **alone)


def shared_gate_up(block, what):
    """The weights of their shared expert's two projections, or these weights' gradients, as one `[1, 2F, D]`."""
    weights = [block.shared_experts.gate_proj.weight, block.shared_experts.up_proj.weight]
    return torch.cat([w if what == "weight" else w.grad for w in weights]).unsqueeze(0)


@pytest.mark.parametrize("choices", range(1, 7))
@pytest.mark.parametrize("score", SCORES)
def test_block_equals_deepseek_v4(score, choices):
    """Router, routed experts and the whole block with its shared expert."""
    torch.manual_seed(choices)
    block = build_theirs(score, choices)
    gate, experts, shared = build_ours(block, score)
    token_BL = torch.randint(VOCABULARY, (3, 9))
    x_BLD = torch.randn(3, 9, WIDTH, requires_grad=True)
    hidden = torch.einsum("bld,efd->eblf", x_BLD.detach(), block.experts.gate_up_proj.detach())
    for cut in (hidden > LIMIT, hidden < -LIMIT):
        assert cut.any() and not cut.all()

    _, their_weight_TK, expert_TK = block.gate(x_BLD, token_BL)
    their_routed_TD = block.experts(x_BLD.view(-1, WIDTH), expert_TK, their_weight_TK)
    their_y_BLD = block(x_BLD, token_BL)

    x_TD = x_BLD.detach().view(-1, WIDTH).clone().requires_grad_()
    weight_TK = gate(x_TD, block.gate.tid2eid[token_BL.flatten()])
    plan = make_dispatcher(ExpertParallel(EXPERTS)).begin(expert_TK).plan
    routed_TD = combine(experts(dispatch(x_TD, plan), plan.rows_per_expert), plan, weight_TK)
    y_TD = routed_TD + shared(x_TD, (len(x_TD),))
    torch.testing.assert_close(weight_TK, their_weight_TK, **TOLERANCE)
    torch.testing.assert_close(routed_TD, their_routed_TD, **TOLERANCE)
    torch.testing.assert_close(y_TD, their_y_BLD.view(-1, WIDTH), **TOLERANCE)

    factor_TD = torch.randn_like(y_TD)
    (y_TD * factor_TD).sum().backward()
    (their_y_BLD.view(-1, WIDTH) * factor_TD).sum().backward()
    gradients = {
        "input": (x_TD.grad, x_BLD.grad.view(-1, WIDTH)),
        "gate": (gate.weight.grad, block.gate.weight.grad),
        "gate and up": (experts.gate_up_weight.grad, block.experts.gate_up_proj.grad),
        "down": (experts.down_weight.grad, block.experts.down_proj.grad),
        "shared gate and up": (shared.gate_up_weight.grad, shared_gate_up(block, "gradient")),
        "shared down": (shared.down_weight.grad[0], block.shared_experts.down_proj.weight.grad),
    }
    for name, (ours, their) in gradients.items():
        torch.testing.assert_close(ours, their, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    if choices > 1:
        assert gate.weight.grad.abs().max() > 0.01
    else:  # one expert's share of itself is 1, whatever its score
        assert not gate.weight.grad.any()


@pytest.mark.parametrize("score", ["sigmoid", "sqrt-softplus"])
def test_weights_agree_as_far_as_theirs_reach(score):
    """Logits from -30 to 30: their scores' sum is still far from the 1e-20 that they add to it."""
    torch.manual_seed(0)
    block = build_theirs(score, 4)
    gate = copy_into(HashWeights(WIDTH, EXPERTS, score, SCALE), weight=block.gate.weight)
    token_T = torch.arange(VOCABULARY)
    x_TD = torch.randn(VOCABULARY, WIDTH) * 8
    logits = x_TD @ block.gate.weight.detach().t()
    assert logits.min() < -20 and logits.max() > 20
    _, weight_TK, expert_TK = block.gate(x_TD, token_T)
    torch.testing.assert_close(gate(x_TD, expert_TK), weight_TK, **TOLERANCE)
