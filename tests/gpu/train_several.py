"""Be one process that runs several commands of fairseq, one after the other; `trainings` starts it.

    python train_several.py JOBS.json

Imports and the start of CUDA take longer than a training of the tests, and are paid once. Each job is a dict: `words`
(the command and its arguments), `log` (the file for what it says) and `forced` (what one rank is to do that fairseq
leaves to several). A job that fails leaves the others alone; its exit code stands in its log.
"""

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from fairseq.trainer import Trainer

from fairseq_hash.lm import model
from fairseq_hash.parallel.groups import ExpertParallel

EXIT_CODE = "train_several exit code:"


def main(path):
    """Run the jobs."""
    for job in json.loads(Path(path).read_text()):
        with said_in(job["log"]):
            print(EXIT_CODE, run(job["words"], job["forced"]), flush=True)


@contextlib.contextmanager
def said_in(path):
    """Let what is said go to a file."""
    before = [os.dup(1), os.dup(2)]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, stream)
            os.close(kept)


def run(words, forced):
    """Run a command of fairseq; return its exit code."""
    sys.argv = [f"fairseq_{words[0]}", *words[1:]]
    try:
        with contextlib.ExitStack() as stack:
            for name in forced:
                stack.enter_context(FORCED[name]())
            importlib.import_module(f"fairseq_cli.{words[0]}").cli_main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, flush=True)
            return 1
        return end.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def wrapped():
    """Wrap the model as for several ranks: fairseq's trainer leaves that out with one."""
    return mock.patch.object(Trainer, "use_distributed_wrapper", property(lambda trainer: True))


@contextlib.contextmanager
def shared():
    """Share the experts among the one rank that there is: rows, split sizes and norms go through the process group."""

    def expert_parallel(num_experts, size):
        return ExpertParallel(num_experts, 1, 0, 1, dist.new_group([0]))

    is_shared = property(lambda parallel: parallel.group is not None)
    with (
        mock.patch.object(ExpertParallel, "is_shared", is_shared),
        mock.patch.object(model, "expert_parallel", expert_parallel),
    ):
        yield


@contextlib.contextmanager
def on_a_cpu():
    """Let fairscale shard on a CPU, for the rest of this process."""
    import training_ranks

    training_ranks.let_fairscale_shard_on_a_cpu()
    torch.cuda.synchronize = lambda: None
    yield


FORCED = {"wrapped": wrapped, "shared": shared, "on_a_cpu": on_a_cpu}

if __name__ == "__main__":
    main(sys.argv[1])
