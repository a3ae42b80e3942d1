"""The top-k router equals the router of transformers' DeepSeek-V3 with one group: output and all gradients.

Runs where `transformers` is installed and has that model: pip install -e '.[peers]'.
"""

import pytest
import torch
from torch import nn

from fairseq_hash.moe.dispatchers import make_dispatcher
from fairseq_hash.moe.experts import GatedFeedForward
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import TopKRouter
from fairseq_hash.moe.routing_context import RoutingContext
from fairseq_hash.parallel.groups import ExpertParallel

theirs = pytest.importorskip(
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    reason="needs transformers with DeepSeek-V3",
    exc_type=ImportError,
)

WIDTH, HIDDEN, EXPERTS, SCALE = 16, 24, 8, 2.5
# fp32 on both sides: sums of some tens of products in another order, then quotients of scores.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize("choices, normalize", [(1, False), (3, True), (3, False), (8, True)])
def test_layer_equals_deepseek_v3(choices, normalize):
    """Choices, weights, and the whole layer with its shared expert."""
    torch.manual_seed(choices)
    config = theirs.DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=choices,
        norm_topk_prob=normalize,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=SCALE,
        experts_implementation="eager",
    )
    block = theirs.DeepseekV3MoE(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.uniform_(block.gate.e_score_correction_bias, -0.5, 0.5)

    options = {"balancing": "bias", "score": "sigmoid", "normalize": normalize, "scale": SCALE}
    router = TopKRouter(WIDTH, EXPERTS, choices, 0, **options)
    experts, shared = (GatedFeedForward(ids, WIDTH, HIDDEN, 0.0, 0.0, (0,)) for ids in (range(EXPERTS), [0]))
    layer = SparseLayer(router, experts, make_dispatcher(ExpertParallel(EXPERTS)), shared=shared)
    one = block.shared_experts
    with torch.no_grad():
        router.weight.copy_(block.gate.weight)
        router.bias_E.copy_(block.gate.e_score_correction_bias)
        experts.gate_up_weight.copy_(block.experts.gate_up_proj)
        experts.down_weight.copy_(block.experts.down_proj)
        shared.gate_up_weight.copy_(torch.cat([one.gate_proj.weight, one.up_proj.weight]).unsqueeze(0))
        shared.down_weight.copy_(one.down_proj.weight.unsqueeze(0))

    x_LBD = torch.randn(9, 3, WIDTH, requires_grad=True)
    x_their = x_LBD.detach().clone().requires_grad_()
    _, their_weight_TK, their_expert_TK = block.gate(x_their)
    made = router(x_LBD.view(-1, WIDTH))
    order_TK, their_order_TK = made.expert_TK.argsort(dim=1), their_expert_TK.argsort(dim=1)
    assert torch.equal(made.expert_TK.gather(1, order_TK), their_expert_TK.gather(1, their_order_TK))
    by_score_TK = (x_LBD.view(-1, WIDTH) @ router.weight.t()).topk(choices).indices.sort(dim=1).values
    assert choices == EXPERTS or not torch.equal(made.expert_TK.sort(dim=1).values, by_score_TK), "the bias is idle"
    weight_TK = made.weight_TK.gather(1, order_TK)
    torch.testing.assert_close(weight_TK, their_weight_TK.gather(1, their_order_TK), **TOLERANCE)

    y_LBD, _ = layer(x_LBD, RoutingContext(None))
    their_y_LBD = block(x_their)
    torch.testing.assert_close(y_LBD, their_y_LBD, **TOLERANCE)
    factor_LBD = torch.randn_like(y_LBD)
    (y_LBD * factor_LBD).sum().backward()
    (their_y_LBD * factor_LBD).sum().backward()
    gradients = {
        "input": (x_LBD.grad, x_their.grad),
        "router": (router.weight.grad, block.gate.weight.grad),
        "gate and up": (experts.gate_up_weight.grad, block.experts.gate_up_proj.grad),
        "down": (experts.down_weight.grad, block.experts.down_proj.grad),
        "shared gate and up": (
            shared.gate_up_weight.grad[0],
            torch.cat([one.gate_proj.weight.grad, one.up_proj.weight.grad]),
        ),
        "shared down": (shared.down_weight.grad[0], one.down_proj.weight.grad),
    }
    for name, (ours, their) in gradients.items():
        torch.testing.assert_close(ours, their, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    assert router.weight.grad.abs().max() > 0.01
