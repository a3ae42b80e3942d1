"""What does not go with shared experts is refused before training starts, in one line that says what to do."""

import pytest
import torch
from fairseq import optim, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from plugin import TINY, USER_DIR

from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.dispatchers import DISPATCHERS
from fairseq_hash.training.shared_experts import SharedTraining, check_device, check_training


def configuration(*arguments):
    """Return fairseq's configuration for `fairseq-train` arguments."""
    parser = options.get_training_parser()
    fixed = ("data", "--task", "language_modeling", "--user-dir", USER_DIR, "--ddp-backend", "legacy_ddp", *TINY)
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [*fixed, *arguments]))


@pytest.mark.parametrize(
    "arguments",
    [
        *("", "--ddp-backend pytorch_ddp", "--ddp-backend fully_sharded --use-sharded-state --fp16"),
        *("--bf16", "--fp16 --fp16-no-flatten-grads", "--memory-efficient-fp16"),
    ],
)
def test_what_goes_with_shared_experts(arguments):
    check_training(configuration(*arguments.split()), DISPATCHERS["all-to-all"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ddp-backend", "slowmo"), "--ddp-backend slowmo .* use legacy_ddp, pytorch_ddp or fully_sharded"),
        (("--ddp-backend", "fully_sharded"), "add --use-sharded-state"),
        (("--fp16",), "--fp16 flattens all gradients .* add --fp16-no-flatten-grads"),
        (("--amp",), "--amp keeps a loss scale on every rank, .* use --bf16"),
        (("--zero-sharding", "os"), "--zero-sharding os gives experts to ranks that do not hold them"),
        (("--use-bmuf",), "--use-bmuf does not go with shared experts"),
        (("--model-parallel-size", "2"), "--model-parallel-size does not go with shared experts"),
        (("--store-ema",), "--store-ema does not go with shared experts"),
    ],
)
def test_what_does_not(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        check_training(configuration(*arguments), DISPATCHERS["all-to-all"])
    assert "\n" not in str(caught.value)


def test_what_each_rank_holds_is_not_each_expert_once_with_replicas():
    words = ("--ddp-backend", "fully_sharded", "--use-sharded-state")
    with pytest.raises(UserError, match="--ddp-backend fully_sharded saves .* --expert-replicas .* use legacy_ddp or "):
        check_training(configuration(*words), DISPATCHERS["all-to-all"], has_replicas=True)
    check_training(configuration("--ddp-backend", "pytorch_ddp"), DISPATCHERS["all-to-all"], has_replicas=True)


@pytest.mark.parametrize("arguments", [("--bf16",), ("--memory-efficient-fp16",)])
def test_fairscales_masks_are_fp32(arguments):
    with pytest.raises(UserError, match="does not go with --expert-dispatch fairscale"):
        check_training(configuration(*arguments), DISPATCHERS["fairscale"])
    check_training(configuration(), DISPATCHERS["fairscale"])


def test_sharding_needs_cuda():
    with pytest.raises(UserError, match="--ddp-backend fully_sharded needs CUDA"):
        check_device(is_sharded=True, on_cpu=True)
    check_device(is_sharded=False, on_cpu=True)


@pytest.mark.parametrize(("name", "goes"), [("adam", True), ("sgd", True), ("adagrad", False), ("adafactor", False)])
def test_only_optimizers_of_single_elements_go(name, goes):
    cfg = configuration("--optimizer", name, "--lr", "0.1")
    optimizer = optim.build_optimizer(cfg.optimizer, [torch.nn.Parameter(torch.zeros(2))])
    if goes:
        SharedTraining.check_optimizer(optimizer)
    else:
        with pytest.raises(UserError, match="the optimizer .* may look at whole parameters"):
            SharedTraining.check_optimizer(optimizer)
