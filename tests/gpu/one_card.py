"""Be a rank that shares a card with the other ranks, over gloo (NCCL refuses that): `test_training_exchange` starts it.

    python one_card.py DEVICE WORLD_SIZE RANK MEETING_FILE CHECK

The checks are those of `layer_ranks`, with the tensors on the card.
"""

import sys

import layer_ranks
import ranks
import torch

from fairseq_hash.fairseq_patches.data_parallel import let_gloo_finish

CHECKS = {
    "layer": lambda: layer_ranks.layers(6),
    "fairscale's layer": lambda: layer_ranks.fairscale(4),
    "fairscale's own layer": layer_ranks.gate_in_fairscales_own_layer,
    "base": lambda: layer_ranks.base(4),
}


def main(device, world_size, rank, meeting, check):
    """Run a check."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
    ranks.device = lambda: torch.device(device)
    meeting = f"file://{meeting}"
    torch.distributed.init_process_group("gloo", init_method=meeting, world_size=int(world_size), rank=int(rank))
    CHECKS[check]()
    torch.distributed.barrier()
    let_gloo_finish()
    torch.distributed.destroy_process_group()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
