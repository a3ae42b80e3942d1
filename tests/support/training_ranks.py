"""What several ranks do with a whole model whose experts they share; `ranks` runs these functions."""

import contextlib
import io

import ranks
import recorded
import torch
import torch.distributed as dist
from plugin import build
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_hash.lm import model
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.training import shared_experts

# What makes the host wait for the device: values, and shapes that depend on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "equal", "_to_copy")


def make_model(data, *arguments):
    """Return the model of some arguments and random tokens, others on each rank."""
    torch.manual_seed(5)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with contextlib.redirect_stderr(io.StringIO()):
        shared = ("--distributed-world-size", world_size, "--distributed-rank", rank)
        _, _, model, _ = build(data, *shared, *arguments)
    generator = torch.Generator().manual_seed(rank)
    return model.to(ranks.device()), torch.randint(4, 60, (3, 8), generator=generator).to(ranks.device())


def split_exchanges(data, *arguments):
    """Return how often split sizes are exchanged in a forward and a backward pass."""
    model, tokens = make_model(data, *arguments)
    traffic = model.decoder.parallel.traffic
    y, _ = model(tokens)
    forward = traffic.split_exchanges
    y.sum().backward()
    return forward, traffic.split_exchanges - forward


class NoWaiting(TorchDispatchMode):
    """Refuse the operations with which the host waits for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_to_copy" and not (kwargs or {}).get("device"):
            name = "a copy on the device"
        assert name not in WAITING, f"{function} makes the host wait"
        waits = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        assert not waits, "repeat_interleave without output_size makes the host wait"
        return function(*args, **(kwargs or {}))


def waits_inside_layers(data, *arguments):
    """Run the sparse layers of a model, forward and backward, under `NoWaiting`; return how often lists were read."""
    model, tokens = make_model(data, *arguments)
    read, to_list = [], torch.Tensor.tolist

    def counted(tensor):
        read.append(tensor.shape)
        return to_list(tensor)

    for layer in (module for module in model.modules() if isinstance(module, SparseLayer)):

        def forward(*args, original=layer.forward):
            with NoWaiting():
                return original(*args)

        layer.forward = forward
    torch.Tensor.tolist = counted
    try:
        y, _ = model(tokens)
        forward = len(read)
        with NoWaiting():
            y.sum().backward()
    finally:
        torch.Tensor.tolist = to_list
    return forward, len(read) - forward


def train_with_overflow(data, arguments):
    """Train in fp16 with one rank's loss too large for it at update 3; return the final loss scale and updates."""
    # The trainer takes the norm of a skipped update to a GPU.
    torch.Tensor.cuda = lambda tensor: tensor
    trainer, epoch_itr = recorded.make_trainer(data, arguments)
    train_step = trainer.task.train_step

    def too_large(sample, model, criterion, optimizer, update_num, *args, **kwargs):
        if update_num == 3 and dist.get_rank() == 1 and not scales:
            scales.append(optimizer.scaler.loss_scale)
            optimizer.scaler.loss_scale = 2.0**40
            try:
                return train_step(sample, model, criterion, optimizer, update_num, *args, **kwargs)
            finally:
                optimizer.scaler.loss_scale = scales[0]
        return train_step(sample, model, criterion, optimizer, update_num, *args, **kwargs)

    scales = []
    trainer.task.train_step = too_large
    recorded.run(trainer, epoch_itr, 6)
    return trainer.optimizer.scaler.loss_scale, trainer.get_num_updates()


class NoStream:
    """What stands for a CUDA stream on a CPU: work is done at once."""

    def wait_stream(self, other):
        """Wait for nothing."""

    def __eq__(self, other):
        return isinstance(other, NoStream)


def let_fairscale_shard_on_a_cpu():
    """Make fairscale's fully sharded data parallel run without CUDA; what it does to parameters is the same."""
    from fairscale.nn.data_parallel import fully_sharded_data_parallel as fairscale

    def set_up_streams(module, original=fairscale.FullyShardedDataParallel._setup_streams):
        original(module)
        module._streams.update((name, NoStream()) for name in ("all_gather", "post_backward", "fp32_to_fp16"))

    def reduce_scatter(output, given, original=dist._reduce_scatter_base, **others):
        return original(output, given.view(-1), **others)  # gloo compares first dimensions, NCCL sizes

    dist._reduce_scatter_base = reduce_scatter
    fairscale.FullyShardedDataParallel._setup_streams = set_up_streams
    fairscale._get_default_cuda_device = lambda module: torch.device("cpu")
    torch.cuda.current_stream = NoStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Tensor.cuda = lambda tensor: tensor
    shared_experts.check_device = model.check_device = lambda *args, **kwargs: None


def train_fully_sharded(data, arguments):
    """Return losses and gradient norms of a training with fully sharded data parallel."""
    let_fairscale_shard_on_a_cpu()
    sharded = ("--ddp-backend", "fully_sharded", "--use-sharded-state")
    trainer, epoch_itr = recorded.make_trainer(data, (*arguments, *sharded))
    record = recorded.keep_losses_and_norms(trainer)
    recorded.run(trainer, epoch_itr, recorded.UPDATES)
    recorded.validate(trainer)
    assert {hasattr(p, "expert") for p in trainer.model.parameters()} == {True, False}
    assert all(p._is_sharded != hasattr(p, "expert") for p in trainer.model.parameters())
    return record
