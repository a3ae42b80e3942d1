"""Routers that end up fixed: StableMoE in both stages, and the frozen random projection, against naive references."""

import pytest
import recorded
import reference
import torch
from exactness import SUBSETS
from fairseq import checkpoint_utils

from fairseq_hash.moe.routers import RandomLinearRouter, StableRouter
from fairseq_hash.moe.routing_context import RoutedTokens

WIDTH, LIGHT, EXPERTS, VOCABULARY, TOKENS = 6, 3, 4, 11, 40
# fp32 beside fp64: sums of some products, then a sigmoid or a softmax.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
LAYERS = ("--sparse-layers", "0,1", "--num-experts", "4", "--clip-norm", "0.2", *SUBSETS)
STABLE = ("--router", "stablemoe", *LAYERS, "--load-balance-weight", "0.3", "--weight-decay", "0.1", "--lr", "0.05")


def made(updates=0):
    """A router with random weights after some updates, of which 3 are stage 1's; activations and ids."""
    torch.manual_seed(0)
    router = StableRouter(WIDTH, EXPERTS, VOCABULARY, 3, LIGHT, 0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    for _ in range(updates):
        router.after_update(torch.zeros(EXPERTS))
    tokens = RoutedTokens(torch.randint(VOCABULARY, (TOKENS,)), torch.zeros(TOKENS, dtype=torch.int64))
    return router, torch.randn(TOKENS, WIDTH, requires_grad=True), tokens


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("updates", [2, 3])
def test_both_stages_equal_the_naive_loop(updates, is_training):
    """Experts, gates, statistics and every gradient: in the last update of stage 1 and the first one of stage 2."""
    router, x_TD, tokens = made(updates)
    found = router.train(is_training)(x_TD, tokens)
    exact = {name: p.detach().double().requires_grad_() for name, p in router.named_parameters()}
    x_ref = x_TD.detach().double().requires_grad_()
    weights = exact["centroids"], exact["light_centroids"], exact["light_embedding.weight"]
    table = None
    if updates == 3:
        table = reference.base_greedy(weights[2], weights[1])
    experts, gates, *expected = reference.stable_route(x_ref, tokens.id_T.tolist(), *weights, is_training, table)
    assert found.expert_TK.flatten().tolist() == experts
    gate_T = torch.stack(gates)
    torch.testing.assert_close(found.weight_TK.flatten().double(), gate_T, **TOLERANCE)
    statistics = [getattr(found.statistics, name) for name in ("agreement", "balance_loss", "distill_loss")]
    for value, other in zip(statistics, expected, strict=True):
        torch.testing.assert_close(value.double(), torch.as_tensor(other, dtype=torch.float64), **TOLERANCE)
    assert (statistics[1].abs() > 0.01) == (statistics[2] > 0.1) == (updates == 2)
    weight_T = torch.randn(TOKENS)
    loss = (found.weight_TK.flatten() * weight_T).sum() + 0.3 * statistics[1] + 0.2 * statistics[2]
    loss_ref = (gate_T * weight_T.double()).sum() + 0.3 * expected[1] + 0.2 * expected[2]
    loss.backward()
    loss_ref.backward()
    torch.testing.assert_close(x_TD.grad.double(), x_ref.grad, **TOLERANCE)
    for name, parameter in router.named_parameters():
        gradient = exact[name].grad if exact[name].grad is not None else torch.zeros_like(exact[name])
        torch.testing.assert_close(parameter.grad.double(), gradient, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_the_table_stays():
    """Of stage 2: whatever happens to the light router's weights, and in bfloat16 and without tokens."""
    router, x_TD, tokens = made(3)
    first = router(x_TD, tokens).expert_TK
    assert torch.equal(router.expert_V[tokens.id_T], first.flatten())
    router.after_update(torch.zeros(EXPERTS))
    with torch.no_grad():
        router.light_embedding.weight.neg_()
    assert torch.equal(router(x_TD, tokens).expert_TK, first)
    later = StableRouter(WIDTH, EXPERTS, VOCABULARY, 99, LIGHT, 0)  # in fine-tuning, say, with more updates of stage 1
    later.load_state_dict(router.state_dict())
    assert later.is_fixed and torch.equal(later(x_TD, tokens).expert_TK, first)
    low = router.bfloat16()(x_TD.bfloat16(), tokens)
    assert torch.equal(low.expert_TK, first) and low.weight_TK.dtype == torch.float32
    for updates in (0, 3):
        router, x_TD, tokens = made(updates)
        none = router(x_TD[:0], RoutedTokens(tokens.id_T[:0], tokens.sentence_T[:0]))
        (none.weight_TK.sum() + none.statistics.balance_loss + none.statistics.distill_loss).backward()
        assert not any(parameter.grad.any() for parameter in router.parameters())


def keep_routes(trainer):
    """Return a list that gets the update, token ids and their experts of each batch in the first layer."""
    routes = []

    def keep(router, inputs, assignment):
        pairs = zip(inputs[1].id_T.tolist(), assignment.expert_TK.flatten().tolist(), strict=True)
        routes.append((trainer.get_num_updates(), list(pairs)))

    trainer.get_model().decoder.layers[0].sparse.router.register_forward_hook(keep)
    return routes


def test_in_stage_2_a_token_id_keeps_its_expert(data):
    """Adam's momentum and weight decay go on moving the light router's weights, and no token."""
    trainer, epoch_itr = recorded.make_trainer(data, (*STABLE, "--stable-updates", "4"))
    routes = keep_routes(trainer)
    recorded.run(trainer, epoch_itr, 10)

    def experts_of(token, stage):
        return {expert for update, pairs in routes for t, expert in pairs if t == token and (update >= 4) == stage}

    tokens = {token for _, pairs in routes for token, _ in pairs}
    assert all(len(experts_of(token, True)) <= 1 for token in tokens)
    assert any(len(experts_of(token, False)) > 1 for token in tokens)
    router = trainer.get_model().decoder.layers[0].sparse.router
    assert not torch.equal(router._light_scores(torch.arange(len(router.expert_V))).argmax(1), router.expert_V)


@pytest.mark.parametrize("saved", [3, 4, 5])
def test_resuming_before_at_and_after_the_switch(data, tmp_path, saved):
    """The same parameters and buffers as without a stop, bit for bit."""
    options = (*STABLE, "--stable-updates", "4")
    trainer, epoch_itr = recorded.make_trainer(data, options)
    recorded.run(trainer, epoch_itr, 7)
    expected = trainer.get_model().state_dict()
    options = (*options, "--save-dir", str(tmp_path))
    trainer, epoch_itr = recorded.make_trainer(data, options)
    recorded.run(trainer, epoch_itr, saved)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    resumed, epoch_itr = recorded.make_trainer(data, options)
    assert resumed.get_model().decoder.layers[0].sparse.router.is_fixed == (saved >= 4)
    recorded.run(resumed, epoch_itr, 7)
    for name, value in resumed.get_model().state_dict().items():
        assert torch.equal(value, expected[name]) or name.endswith("_float_tensor"), name
    assert expected["decoder.layers.0.sparse.router.updates"] == 5  # the first update of stage 2 was the last counted
    if saved == 3:
        shorter = (*options, "--stable-updates", "2")
        with pytest.raises(SystemExit, match="it has 3 updates and still learns its routing; give --stable-updates 3"):
            recorded.make_trainer(data, shorter)


def test_random_linear_is_the_largest_frozen_score():
    torch.manual_seed(1)
    router = RandomLinearRouter(WIDTH, EXPERTS, 2)
    x_TD = torch.randn(TOKENS, WIDTH, requires_grad=True)
    found = router(x_TD)
    assert found.expert_TK.flatten().tolist() == reference.base_greedy(x_TD.double(), router.weight.double())
    assert found.weight_TK is None and not found.expert_TK.requires_grad and not list(router.parameters())
    torch.rand(3)
    assert torch.equal(router.weight, RandomLinearRouter(WIDTH, EXPERTS, 2).weight)
    assert not torch.equal(router.weight, RandomLinearRouter(WIDTH, EXPERTS, 3).weight)
    assert torch.equal(router.bfloat16()(x_TD.bfloat16()).expert_TK, router.float()(x_TD.bfloat16()).expert_TK)


def test_random_linear_does_not_train(data, tmp_path):
    """Its weight never changes, and is that of the checkpoint, whatever the seed would give."""
    options = ("--router", "random-linear", *LAYERS, "--weight-decay", "0.1", "--save-dir", str(tmp_path))
    trainer, epoch_itr = recorded.make_trainer(data, options)
    name = "decoder.layers.1.sparse.router.weight"
    before = trainer.get_model().state_dict()[name].neg_().clone()
    recorded.run(trainer, epoch_itr, 3)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    assert torch.equal(trainer.get_model().state_dict()[name], before)
    resumed, _ = recorded.make_trainer(data, options)
    assert torch.equal(resumed.get_model().state_dict()[name], before)
