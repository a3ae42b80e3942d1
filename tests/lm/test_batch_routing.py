"""The routers gshard, sinkhorn and expert-choice in the model: decoding, padding, checkpoints, oracles, refusals."""

import re

import pytest
import recorded
import torch
from fairseq import checkpoint_utils
from plugin import build, evaluate, records, train

import fairseq_hash
from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.routers import register_router, router_class, sees_future, statistics_of
from fairseq_hash.moe.routing_stats import NoStatistics, RoutingReport
from fairseq_hash.options.sparse_options import SparseOptions

LAYERS = ("--sparse-layers", "0,1", "--num-experts", "4")
MODELS = {
    "gshard": ("--router", "gshard", *LAYERS, "--capacity-factor", "1"),
    "gshard random": ("--router", "gshard", *LAYERS, "--second-expert-policy", "random"),
    "sinkhorn": ("--router", "sinkhorn", *LAYERS),
    "expert-choice": ("--router", "expert-choice", *LAYERS, "--capacity-factor", "2", "--eval-capacity-factor", "1.5"),
}
CAUSAL = ["gshard", "sinkhorn"]


def model_of(data, name, *more):
    torch.manual_seed(1)
    _, task, model, _ = build(data, *MODELS[name], *more)
    for layer in model.modules():
        if isinstance(layer, SparseLayer):  # away from zero, so that tokens differ
            torch.nn.init.normal_(next(layer.router.parameters()), std=0.5)
    return model, torch.randint(4, len(task.source_dictionary), (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CAUSAL)
def test_step_by_step_gives_the_logits_of_the_full_pass(data, name):
    model, token_BL = model_of(data, name)
    model.eval()
    state = {}
    steps = [model.decoder(token_BL[:, : n + 1], incremental_state=state)[0] for n in range(token_BL.shape[1])]
    # One position at a time: the products are of other shapes and sum in another order.
    torch.testing.assert_close(torch.cat(steps, dim=1), model(token_BL)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_padding_is_never_routed_or_counted(data, name):
    model, token_BL = model_of(data, name)
    model.eval()
    padded_BL = torch.cat([token_BL, torch.ones(3, 5, dtype=torch.int64)], dim=1)
    (alone, extra), (beside, extra_beside) = model(token_BL), model(padded_BL)
    torch.testing.assert_close(beside[:, :12], alone, rtol=1e-4, atol=1e-5)
    for layer, sums in extra["routing"].items():
        torch.testing.assert_close(extra_beside["routing"][layer], sums, rtol=1e-4, atol=1e-5)
        assert RoutingReport(sums, statistics_of(layer[1])).tokens == 36


@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_draws_the_same_again(data, name):
    found = []
    for extra in ((), ("--checkpoint-activations",)):
        model, token_BL = model_of(data, name, *extra)
        torch.manual_seed(7)
        logits, more = model(token_BL)
        (logits.square().sum() + sum(sums.sum() for sums in more["routing"].values())).backward()
        found.append((logits, {key: p.grad for key, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["gshard", "sinkhorn"])
def test_a_training_goes_on_from_its_checkpoint_as_without_a_break(data, tmp_path, name):
    """Bit for bit, random draws included: fairseq seeds each update by its number."""
    trainers = []
    for folder, updates in (("whole", 4), ("parts", 2), ("parts", 4)):
        arguments = (*MODELS[name], "--save-dir", str(tmp_path / folder), "--max-tokens", "128")
        trainer, epoch_itr = recorded.make_trainer(data, arguments)
        recorded.run(trainer, epoch_itr, updates)
        checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
        trainers.append(trainer)
    whole, _, resumed = trainers
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_expert_choice_is_an_oracle_everywhere(data, tmp_path):
    """In the logs of its training, in its evaluation, in the Python interface, and where it is to generate."""
    done = train(data, tmp_path, *MODELS["expert-choice"])
    assert all("oracle_ppl" in record and "ppl" not in record for record in records(done, "train_inner"))
    assert all("valid_oracle_ppl" in record and "valid_ppl" not in record for record in records(done, "valid"))
    assert '"oracle": "--router expert-choice"' in done.stdout + done.stderr
    evaluated = evaluate(data, tmp_path / "checkpoint_best.pt")
    said = evaluated.stdout + evaluated.stderr
    assert "Perplexity of an oracle, which sees the next token: " in said and "Perplexity: " not in said
    with pytest.raises(SystemExit, match="an oracle has no such perplexity; use loss, or oracle_ppl"):
        recorded.make_trainer(data, (*MODELS["expert-choice"], "--best-checkpoint-metric", "ppl"))
    with pytest.raises(SystemExit, match="cross_entropy calls the perplexity of --router expert-choice, an oracle, a"):
        recorded.make_trainer(data, (*MODELS["expert-choice"], "--criterion", "cross_entropy"))
    model, token_BL = model_of(data, "expert-choice")
    with pytest.raises(SystemExit, match="--router expert-choice sees the next token, which generation does not have"):
        model.decoder(token_BL[:, :1], incremental_state={})
    loaded = fairseq_hash.load(tmp_path / "checkpoint_best.pt")
    with pytest.raises(UserError, match="--router expert-choice sees the token that it is to predict"):
        loaded.sample("a b")
    # Each choice of an expert is a row; a token without one has a row, too.
    routes = loaded.routes("a b c d e f g h")
    for _, of_layer in routes.groupby("layer"):
        served = of_layer[~of_layer["dropped"]]
        tokens = of_layer["position"].nunique()
        assert served["expert"].value_counts().tolist() == [-(-tokens * 3 // 8)] * 4
        assert len(of_layer) == len(served) + tokens - served["position"].nunique()


def test_a_router_from_outside_may_be_an_oracle(monkeypatch):
    assert not sees_future("switch") and not sees_future("hash") and not sees_future("no such")
    monkeypatch.setattr("fairseq_hash.moe.routers.registry._ROUTERS", {"switch": router_class("switch")})
    register_router("mine")(type("Mine", (), {"sees_future": True, "statistics": NoStatistics}))
    assert SparseOptions(router="switch,mine", sparse_layers="0,1").oracle == "--router mine"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--router", "gshard", "--num-experts", "1"), "--router gshard picks 2 experts of --num-experts 1; give 2"),
        (
            (
                "--router",
                "expert-choice",
            ),
            "--router expert-choice needs --capacity-factor and --eval-capacity-factor",
        ),
        (("--router", "gshard", "--second-expert-policy", "best"), "use one of sampling, all, random"),
        (("--router", "sinkhorn", "--sinkhorn-balance", "shuffle"), "use one of global, local"),
        (("--router", "sinkhorn", "--sinkhorn-iterations", "0"), "--sinkhorn-iterations 0 is out of range"),
        (("--router", "sinkhorn", "--sinkhorn-tolerance", "nan"), "--sinkhorn-tolerance nan is out of range"),
    ],
)
def test_values_that_are_refused(data, words, line):
    with pytest.raises(SystemExit, match=re.escape(line)):
        build(data, *LAYERS, *words)
