"""benchmarks/train.py on a tiny model: every candidate trains and decodes, and both files have the same numbers."""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "train.py"
TINY = "--experts 4 --layers 2 --sparse-layers 1 --width 16 --hidden 32 --tokens 64 --updates 3 --prefix 2 --steps 4"


NAMES = ("dense", "hash", "switch", "base")
# Of 64 tokens: output, projections and FFNs of both layers, attention over all 64; backward is twice the forward pass.
FLOPS = 64 * 3 * (2 * (64 * 16 + 2 * (4 * 16 * 16 + 2 * 16 * 32)) + 2 * 4 * 16 * 64)


def run(folder, *arguments):
    """Run the program where there is no compiler; return the finished process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # With an empty cache, so that no earlier compilation stands in.
    environment |= {"CXX": str(folder / "no compiler"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(PROGRAM), *TINY.split(), "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    """What a run wrote: the content of the JSON file, the Markdown, and what was printed."""
    folder = tmp_path_factory.mktemp("measured")
    files = "--json", folder / "train.json", "--out", folder / "train.md"
    done = run(folder, "--data", data, "--batch", 1, 3, "--candidates", *NAMES, "plain", "compiled", *files)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "train.json").read_text()), (folder / "train.md").read_text(), done.stdout


def test_every_candidate_trains(measured):
    content, _, _ = measured
    assert content["benchmark"] == "train" and content["settings"]["width"] == 16 and content["provenance"]["torch"]
    trained = {row["candidate"]: row for row in content["rows"] if "updates_per_second" in row}
    assert list(trained) == [*NAMES, "plain"]
    for row in trained.values():
        assert (row["experts"], row["tokens"]) == (4, 64)
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["updates_per_second"] == pytest.approx(1 / row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(64 / row["seconds"])
        assert row["state_bytes_planned"] == 16 * row["parameters"] <= row["held_bytes"]
        assert row["rate_flops_per_second"] == trained["dense"]["rate_flops_per_second"]
        assert row["utilisation"] == pytest.approx(row["model_flops_per_second"] / row["rate_flops_per_second"])
        assert row["model_flops_per_second"] * row["seconds"] == pytest.approx(FLOPS)
        # None where the system cannot tell.
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 12 * row["parameters"]
    assert trained["dense"]["ratio"] == 1
    assert trained["plain"]["parameters"] == trained["plain"]["active"] == trained["dense"]["parameters"]
    feed_forward = 16 * 32 + 32 + 32 * 16 + 16
    assert trained["hash"]["parameters"] == trained["dense"]["parameters"] + 3 * feed_forward
    assert trained["hash"]["active"] == trained["dense"]["active"] == trained["dense"]["parameters"]
    assert 0 < trained["hash"]["over_base_low"] <= trained["hash"]["over_base"] <= trained["hash"]["over_base_high"]


def test_every_candidate_decodes(measured):
    content, _, _ = measured
    decoded = [row for row in content["rows"] if "updates_per_second" not in row]
    names = [f"{name} decoding" for name in NAMES]
    assert [(row["candidate"], row["tokens"]) for row in decoded] == [(name, size) for size in (1, 3) for name in names]
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in decoded)


def test_what_fails_is_left_out(measured):
    content, markdown, _ = measured
    (line,) = content["left_out"]
    assert line.startswith("compiled is left out with 4 experts: ") and f"\n- {line}\n" in markdown


def test_the_tables_show_the_same(measured):
    content, markdown, printed = measured
    assert printed == markdown
    for row in content["rows"]:
        start = f"| 4 | {row['candidate']} | " if "updates_per_second" in row else f"| 4 | {row['tokens']} | "
        shown = [line for line in markdown.splitlines() if line.startswith(start) and row["candidate"] in line]
        assert len(shown) == 1 and f" {row['ratio']:.2f} |" in shown[0]


def test_the_plain_model_is_the_dense_one(data, monkeypatch):
    """Same loss, same loss after updates, and the products that are counted."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import trainings

    sizes = {"layers": 2, "width": 128, "hidden": 32, "tokens": 64, "sparse_layers": "1"}  # two heads
    more = {"optimizer": "adam", "device": "cpu", "bf16": False, "memory_efficient_bf16": False, "seed": 1}
    arguments = argparse.Namespace(**sizes, **more)
    trainer = trainings.build(trainings.trainer_options(arguments, 1, data, "dense"))
    dense = trainer.get_model()
    with torch.no_grad():  # fairseq's biases are 0, and its norms 1 and 0
        for parameter in dense.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loop = trainings.plain_loop(trainer, arguments, compiled=False)
    plain = loop.model
    batches = trainings.batches_of(trainer, 3)

    def losses(batch):
        with torch.no_grad():
            theirs = trainer.criterion(dense, batch)[0] / batch["ntokens"]
            return theirs, plain(batch["net_input"]["src_tokens"], batch["target"])

    before = losses(batches[0])
    torch.testing.assert_close(*before, rtol=1e-5, atol=0)
    for batch in batches:
        for group in loop.optimizer.param_groups:
            group["lr"] = trainer.get_lr()  # it rises from update to update
        trainings.update(trainer, batch)
        loop.train_step(batch)
    after = losses(batches[0])
    # fairseq's Adam adds eps before the correction of the bias, so the smallest gradients do a little less.
    assert after[0] < before[0] and after[0] - after[1] == pytest.approx(0, abs=0.01 * (before[0] - after[0]).item())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        plain(batches[0]["net_input"]["src_tokens"], batches[0]["target"]).backward()
    assert counter.get_total_flops() == 64 * trainings.flops_of_token(dense, 2, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--updates", "0"), "--updates 0 is out of range; give a number of 1 or more"),
        (("--batch", "1", "0"), "--batch 0 is out of range"),
        (("--prefix", "60", "--steps", "5"), "--prefix and --steps are 65 tokens; give 64 at most"),
        (("--json", "no folder/a.json"), "the folder no folder does not exist; make it first"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *TINY.split(), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and said.count("\n") == 1
