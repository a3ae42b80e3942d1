"""`fairseq-train` with a rank that fails in its third update, or outside: python failures.py HOW RANK ARGUMENTS...

With --config-name it is `fairseq-hydra-train`. The failure is put into the task and the layers from outside; all else
is the real command.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist
from fairseq.tasks.fairseq_task import FairseqTask
from fairseq_cli import hydra_train, train

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.parallel import watchdog
from fairseq_hash.training.stop_signals import StopSignals

SHORT_SILENCE = 5.0


def kill():
    """End at once, as for the kernel that needs memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def fall_silent():
    """Do nothing any more, as on a machine that is cut off: connections stay open, and nothing comes."""
    os.kill(os.getpid(), signal.SIGSTOP)


def raise_an_error():
    """Raise an error of no special kind: fairseq would gather a checkpoint, on this rank alone."""
    raise ValueError("made for the test\nwith a second line")


def run_out_of_memory():
    """Raise what torch raises: fairseq knows it by its text and would go on to the next batch."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


FAILURES = {"killed": kill, "silent": fall_silent, "error": raise_an_error, "memory": run_out_of_memory}


def main(how, failing_rank):
    """Put the failure in its place and train."""
    step, forward, agreed = FairseqTask.train_step, SparseLayer.forward, StopSignals.agreed
    fails = False

    def train_step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs):
        nonlocal fails
        fails = update_num == 2 and dist.get_rank() == failing_rank
        if fails and how == "expert":
            layer = next(module for module in model.modules() if isinstance(module, SparseLayer))
            next(layer.experts.parameters()).data[-1].fill_(float("nan"))
        if fails and how == "nan":

            def criterion(*args, original=criterion):
                loss, *rest = original(*args)
                return loss * float("nan"), *rest

        return step(task, sample, model, criterion, optimizer, update_num, *args, **kwargs)

    def failing_forward(layer, *args, **kwargs):
        if fails and how in FAILURES:  # the other ranks are in the layer, or wait for this one there
            FAILURES[how]()
        return forward(layer, *args, **kwargs)

    def begin_epoch(task, *args):
        if how == "outside" and dist.get_rank() == failing_rank:
            raise_an_error()

    def failing_agreed(signals, device):
        if fails and how == "killed-after":  # the others wait after the update
            kill()
        return agreed(signals, device)

    FairseqTask.train_step, SparseLayer.forward, FairseqTask.begin_epoch = train_step, failing_forward, begin_epoch
    StopSignals.agreed = failing_agreed
    if how == "silent":
        watchdog.SILENCE = SHORT_SILENCE
    (hydra_train if "--config-name" in sys.argv else train).cli_main()


if __name__ == "__main__":
    how, rank = sys.argv[1:3]
    del sys.argv[1:3]
    main(how, int(rank))
