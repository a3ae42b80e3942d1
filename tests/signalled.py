"""`fairseq-train` that signals itself: python signalled.py SIGNAL RANK UPDATE ARGUMENTS...

The rank (or `group`: the process group, data loader workers included) gets the signal within the given update.
"""

import os
import runpy
import signal
import subprocess
import sys

from fairseq.tasks.fairseq_task import FairseqTask


def main(name, whom, update, *arguments):
    """Be the real command, run as a module."""
    original = FairseqTask.train_step

    def train_step(task, sample, model, criterion, optimizer, update_num, *others, **more):
        if update_num == int(update) - 1:
            if whom == "group":
                # By another process, as SLURM does.
                group = str(-os.getpgid(0))
                subprocess.run(
                    ["kill", "-s", name.removeprefix("SIG"), "--", group], check=True, start_new_session=True
                )
            elif whom == os.environ.get("RANK", "0"):
                os.kill(os.getpid(), signal.Signals[name])
        return original(task, sample, model, criterion, optimizer, update_num, *others, **more)

    FairseqTask.train_step = train_step
    sys.argv = ["fairseq-train", *arguments]
    runpy.run_module("fairseq_cli.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
