"""Which experts are named where a training meets NaN."""

import pytest
import recorded
import torch

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.training.not_finite import blame, experts_not_finite

WORDS = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "0,1", "--max-tokens", "64")


@pytest.fixture
def trained(data, tmp_path):
    """A trainer after two updates, with gradients."""
    trainer, epoch_itr = recorded.make_trainer(data, (*WORDS, "--save-dir", str(tmp_path)))
    recorded.run(trainer, epoch_itr, 2)
    return trainer, epoch_itr


def experts(trainer, layer):
    """Return the parameters of the experts of a sparse layer."""
    layers = [module for module in trainer.get_model().modules() if isinstance(module, SparseLayer)]
    return list(layers[layer].experts.parameters())


def test_nobody_is_to_blame(trained):
    assert experts_not_finite(trained[0].get_model()) == [] and blame([]) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("layer", "expert"), [(0, 0), (1, 3)])
@torch.no_grad()
def test_weights_before_gradients(trained, value, layer, expert):
    trainer, _ = trained
    model = trainer.get_model()
    for parameter in experts(trainer, layer):
        parameter.grad[expert].flatten()[-1] = value
    assert experts_not_finite(model) == [f"the gradients of expert {expert} of layer {layer}"]
    experts(trainer, 1 - layer)[1][2].flatten()[0] = value
    assert experts_not_finite(model) == [f"the weights of expert 2 of layer {1 - layer}"]


def test_gradients_say_nothing_beside_other_gradients_that_are_nan(trained):
    trainer, _ = trained
    for parameter in trainer.get_model().parameters():
        parameter.grad.fill_(float("nan"))
    assert experts_not_finite(trainer.get_model()) == []


def test_one_process_names_the_expert(trained):
    trainer, epoch_itr = trained
    experts(trainer, 1)[0].data[3].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="; not finite: the weights of expert 3 of layer 1$"):
        recorded.run(trainer, epoch_itr, 3)


def test_many_are_counted():
    found = [f"the weights of expert {expert} of layer 1" for expert in range(6)]
    assert blame(found + found).endswith("expert 3 of layer 1 and 2 others")
