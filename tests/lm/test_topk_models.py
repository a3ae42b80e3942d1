"""A model with top-k routers: padding, steps, checkpointed activations, and the state of its biases in a training."""

import pytest
import ranks
import recorded
import torch
from biased_ranks import biases, train
from exactness import SUBSETS, one_process
from fairscale.nn.wrap.auto_wrap import ConfigAutoWrap
from fairseq import checkpoint_utils
from passes import assert_padding_is_not_routed, assert_steps_give_the_full_pass, sample_of, tokens_of
from plugin import build

from fairseq_hash.core.errors import UserError
from fairseq_hash.lm import model as hash_model
from fairseq_hash.moe.expert_bias import BINS
from fairseq_hash.options.sparse_options import SparseOptions

TOP_2 = ("--router", "topk", "--sparse-layers", "0,1", "--num-experts", "4", "--experts-per-token", "2")
TOP_2 += ("--router-score", "sigmoid", "--normalize-weights", "--sequence-loss")
BIAS, QUANTILE = ("--balancing", "bias", "--bias-step", "0.01"), ("--balancing", "quantile")
TRAIN = (*TOP_2, "--optimizer", "sgd", "--lr", "0.5", *SUBSETS)


def test_padding_and_steps(data):
    """Padding is never routed or counted; decoding step by step gives the logits of the full pass."""
    _, task, model, _ = build(data, *TOP_2, *QUANTILE)
    for layer in model.decoder.layers:
        layer.sparse.router.bias_E.uniform_(-0.3, 0.3)
    assert_padding_is_not_routed(model.eval(), task)
    assert_steps_give_the_full_pass(model, tokens_of(task))


def test_activation_checkpointing_changes_nothing(data):
    """Loss, log, histograms and every gradient."""
    results = []
    for extra in ((), ("--checkpoint-activations",)):
        torch.manual_seed(1)
        _, task, model, criterion = build(data, *TOP_2, *QUANTILE, "--z-loss-weight", "0.1", *extra)
        loss, _, log = criterion(model, sample_of(task))
        loss.backward()
        results.append((log, {name: p.grad for name, p in model.named_parameters()}))
    (log, gradients), (log_again, gradients_again) = results
    assert log["_layer1|topk|update"].shape == (4 * BINS,) and log["_layer1|topk|update"].sum() == 4 * 36
    assert log.keys() == log_again.keys()
    assert all(torch.equal(torch.as_tensor(log[key]), torch.as_tensor(log_again[key])) for key in log)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("balancing", [BIAS, QUANTILE], ids=["bias", "quantile"])
def test_the_bias_follows_the_batch_of_all_ranks(data, balancing):
    """Two ranks with two batches each, and one rank with four: dummy batches and validation are left out.

    A histogram has each of an update's tokens once for each expert, and each token chose two of four experts.
    """
    arguments = (*TRAIN, *balancing, "--update-freq", "2")
    many = ranks.run(2, "biased_ranks:train", str(data), arguments, 9)
    alone = train(data, one_process(arguments, 2), 9)
    for made in (*many, alone):
        assert torch.equal(made["after validation"], made["biases"][-1])
        assert made["biases"][0].any() and not torch.equal(made["biases"][0], made["biases"][-1])
    for update, bias in enumerate(alone["biases"]):
        assert torch.equal(many[0]["biases"][update], many[1]["biases"][update])
        torch.testing.assert_close(many[0]["biases"][update], bias, rtol=0, atol=1e-6)
    for layer in (0, 1):
        for one, other in zip(many[0]["given"][layer], alone["given"][layer], strict=True):
            assert torch.equal(one[0], other[0]) and len(one) == (2 if balancing is QUANTILE else 1)
            for histogram in one[1:]:
                assert histogram.view(4, BINS).sum(dim=1).tolist() == [one[0].sum() / 2] * 4


@pytest.mark.parametrize("precision", [(), ("--memory-efficient-bf16",)], ids=["fp32", "bf16"])
def test_the_bias_is_in_the_checkpoint_and_in_fp32(data, tmp_path, precision):
    balancing = ("--balancing", "bias", "--bias-step", "0.001")
    arguments = (*TOP_2, *balancing, *SUBSETS, "--save-dir", str(tmp_path), *precision)
    trainer, epoch_itr = recorded.make_trainer(data, arguments)
    recorded.run(trainer, epoch_itr, 4)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    resumed, _ = recorded.make_trainer(data, arguments)
    for one, other in zip(biases(trainer), biases(resumed), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
        # Steps of 0.001: bfloat16 would round 0.003 to 0.00299.
        torch.testing.assert_close(one, (one * 1000).round() / 1000, rtol=0, atol=1e-8)
        assert one.abs().max() > 0.001


def test_a_frozen_router_keeps_its_bias(data):
    trainer, epoch_itr = recorded.make_trainer(data, (*TRAIN, *BIAS, "--freeze", "all-but-experts"))
    recorded.run(trainer, epoch_itr, 2)
    assert not any(bias.any() for bias in biases(trainer))


def test_fully_sharded_data_parallel_is_refused(monkeypatch):
    """It would round the biases; it builds models in this context, and runs on CUDA only."""
    monkeypatch.setattr(ConfigAutoWrap, "in_autowrap_context", True)
    monkeypatch.setattr(hash_model, "check_device", lambda **_: None)
    options = SparseOptions(router="hash,topk", sparse_layers="0,1", balancing="quantile")
    with pytest.raises(UserError, match="--balancing quantile does not go with --ddp-backend fully_sharded"):
        hash_model.check_options(None, options, is_evaluation=False)
