"""What tests of exactness share: trainings of many processes and of one that takes the same batches, compared."""

import torch

TOLERANCE = 1e-5
OPTIMIZERS = {
    "sgd": ("--optimizer", "sgd", "--lr", "0.5"),
    # A gradient of nothing but rounding, divided by itself, would be an update; eps keeps it small.
    "adam": ("--optimizer", "adam", "--lr", "1e-3", "--adam-eps", "1e-6"),
}
# 13 batches an epoch, in training and validation: at the end of each there are fewer batches than ranks.
SUBSETS = ("--train-subset", "valid", "--valid-subset", "test", "--max-tokens", "48")


def arguments(router, experts, optimizer, *more):
    """Return the arguments of one case, clipping active."""
    chosen = ("--router", router, "--num-experts", str(experts), "--sparse-layers", "0,1", "--clip-norm", "0.2")
    return (*chosen, *OPTIMIZERS[optimizer], *SUBSETS, *more)


def one_process(all_arguments, world_size):
    """Return the arguments with which one process takes the batches of `world_size` ranks."""
    changed = list(all_arguments)
    of_several = ("--expert-dispatch", "--expert-parallel-size", "--expert-placement", "--expert-replicas")
    for option in (*of_several, "--ddp-backend"):
        if option in changed:  # one process has nobody to share with
            del changed[changed.index(option) : changed.index(option) + 2]
    if "--update-freq" in changed:
        place = changed.index("--update-freq") + 1
        changed[place] = str(int(changed[place]) * world_size)
        return tuple(changed)
    return (*changed, "--update-freq", str(world_size))


def whole(records, pick, name):
    """Return a tensor of all experts by id, put together from the ranks; or one that all ranks have, which is equal."""
    size = records[0]["size"]
    tensors = [pick(record)[name] for record in records]
    if ".experts." not in name or size == 1:
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), f"{name} differs between ranks"
        return tensors[0]
    assert all(torch.equal(tensor, tensors[rank % size]) for rank, tensor in enumerate(tensors)), "replicas differ"
    experts: dict[int, torch.Tensor] = {}
    for record, tensor_e in zip(records[:size], tensors[:size], strict=True):
        for expert, one in zip(record["experts"], tensor_e, strict=True):
            assert torch.equal(experts.setdefault(expert, one), one), f"copies of expert {expert} differ in {name}"
    return torch.stack([experts[expert] for expert in sorted(experts)])


def relative(tensor, reference):
    """Return the largest difference over the largest value of the reference."""
    return ((tensor.double() - reference.double()).abs().max() / reference.abs().max().clamp(min=1e-30)).item()
