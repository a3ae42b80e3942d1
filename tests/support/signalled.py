"""`fairseq-train` that signals itself: python signalled.py SIGNAL RANK UPDATE ARGUMENTS...

The rank (or `group`: the process group, data loader workers included) gets the signal within the given update; 0 is
while the model is built.
"""

import os
import runpy
import signal
import subprocess
import sys

from fairseq.tasks.fairseq_task import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask


def main(name, whom, update, *arguments):
    """Be the real command, run as a module."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    original, build = FairseqTask.train_step, LanguageModelingTask.build_model

    def send():
        if whom == "group":
            # By another process, as SLURM does.
            group = str(-os.getpgid(0))
            subprocess.run(["kill", "-s", name.removeprefix("SIG"), "--", group], check=True, start_new_session=True)
        elif whom == os.environ.get("RANK", "0"):
            os.kill(os.getpid(), signal.Signals[name])

    def train_step(task, sample, model, criterion, optimizer, update_num, *others, **more):
        if update_num == int(update) - 1:
            send()
        return original(task, sample, model, criterion, optimizer, update_num, *others, **more)

    def build_model(*others, **more):
        if update == "0":
            send()
        return build(*others, **more)

    FairseqTask.train_step, LanguageModelingTask.build_model = train_step, build_model
    sys.argv = ["fairseq-train", *arguments]
    runpy.run_module("fairseq_cli.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
