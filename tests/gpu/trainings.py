"""How the tests of trainings run fairseq: in processes of their own, several trainings in each, on a GPU or the CPU."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import plugin
import pytest

from gpu.train_several import EXIT_CODE

HERE = Path(__file__).parent
TIMEOUT = {"cuda": 60, "cpu": 300}  # seconds, of one process; on the CPU other tests may have the cores
# Widths that a grouped product takes in bfloat16.
SIZES = ("--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64", "--max-tokens", "256")
FIXED = ("--num-workers", "0", "--no-epoch-checkpoints", "--required-batch-size-multiple", "1")
SPARSE = ("--sparse-layers", "0,1", "--num-experts", "4")
HASH = ("--router", "hash", *SPARSE)
SWITCH = ("--router", "switch", *SPARSE)


def skip_long(device):
    """Skip a test of many processes on the CPU, unless the variable GPU_TESTS_LONG is set."""
    if device.type == "cpu" and "GPU_TESTS_LONG" not in os.environ:
        pytest.skip("takes long on the CPU; GPU_TESTS_LONG=1 runs it")


@dataclass
class Job:
    """A command of fairseq, and what is forced on it (see `train_several`)."""

    words: list
    forced: tuple = ()


def train(data, device, save_dir, updates, *options, forced=()):
    """Return the job of a training of the tiny model; a later option replaces an earlier one."""
    words = plugin.train_arguments(data, save_dir, *SIZES, *FIXED, "--max-update", updates, *options)
    return Job(["train", *on_device(words, device)], forced)


def evaluate(data, device, path, *options):
    """Return the job of an evaluation of a checkpoint on the validation set."""
    words = [data, "--user-dir", plugin.USER_DIR, "--path", path, "--cpu", "--max-tokens", "256", "--num-workers", "0"]
    words += ["--gen-subset", "valid", "--tokens-per-sample", "16", *options]
    return Job(["eval_lm", *on_device(words, device)])


def on_device(words, device):
    """Return the words of a command without `--cpu` where it is to use a GPU."""
    return [str(word) for word in words if word != "--cpu" or device.type == "cpu"]


def environment(device, **more):
    """Return the environment of a process.

    A GPU is hidden from one on the CPU: where fairseq sees one, `clip_grad_norm_` takes the norm there even with
    `--cpu`, and cannot scale the gradients by it.
    """
    paths = [str(path) for path in (HERE.parent.parent, HERE.parent, HERE.parent / "support")]
    paths += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **hidden, **more}


def launch(words, device, out, **more):
    """Start `python WORDS`; what it says goes to a file."""
    words, own = [sys.executable, *map(str, words)], environment(device, **more)
    with out.open("w") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(words, env=own, **streams)
    process.out = out
    return process


def wait(process, device):
    """Return the exit code of a process of `launch` and what it said; one that does not end is killed."""
    try:
        process.wait(TIMEOUT[device.type])
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode, process.out.read_text()


class Several:
    """A process under way that does several jobs, by name, in this order."""

    def __init__(self, device, folder, jobs, **more):
        folder.mkdir(parents=True)
        self.device, self.folder, self.names = device, folder, list(jobs)
        listed = [{"words": job.words, "forced": job.forced, "log": str(self._log(name))} for name, job in jobs.items()]
        (folder / "jobs.json").write_text(json.dumps(listed))
        words = (HERE / "train_several.py", folder / "jobs.json")
        self.process = launch(words, device, folder / "out.txt", **more)

    def _log(self, name):
        return self.folder / f"{self.names.index(name)}.log"

    def finish(self, deadline):
        """Wait for the end; a process that does not come to it is killed."""
        try:
            self.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def said(self, name):
        """Return what a job said; its failure fails the test."""
        code, text = self.outcome(name)
        assert code == 0, f"{name}: exit code {code}\n{text[-2000:]}"
        return text

    def outcome(self, name):
        """Return the exit code of a job, and what it said."""
        log = self._log(name)
        text = log.read_text() if log.exists() else ""
        found = re.findall(rf"^{EXIT_CODE} (\d+)$", text, re.MULTILINE)
        if not found:
            text += f"\nit did not end; its process: {(self.folder / 'out.txt').read_text()[-1000:]}"
        return (int(found[0]) if found else self.process.returncode or "none"), text


def finish(*started):
    """Wait for processes that run side by side; return them."""
    device = "cpu" if all(several.device.type == "cpu" for several in started) else "cuda"
    deadline = time.monotonic() + TIMEOUT[device]
    for several in started:
        several.finish(deadline)
    return started


def numbers(said, key="loss"):
    """Return what a training logged under a key, by the number of the update."""
    found = plugin.records(SimpleNamespace(stdout=said, stderr=""), "train_inner")
    return {int(record["num_updates"]): float(record[key]) for record in found}


def perplexity(said):
    """Return the perplexity that fairseq-eval-lm printed."""
    return float(re.findall(r"Perplexity: (\S+)", said)[-1])


def assert_same_losses(found, expected, tolerance=1e-3):
    """Compare losses in bits by update; the log rounds them to three decimals, which is half a unit on either side."""
    assert found.keys() == expected.keys()
    far = {update: (found[update], expected[update]) for update in found}
    far = {update: pair for update, pair in far.items() if not abs(pair[0] - pair[1]) <= tolerance + 1e-9}
    assert not far, f"losses differ by more than {tolerance}: {far}"
