"""Bad input: one line that names the value and the remedy, before training starts."""

import re
import shutil
from dataclasses import fields

import pytest
import torch
from plugin import build, train

from fairseq_hash import hashing
from fairseq_hash.options.criterion_options import HashMoECriterionConfig
from fairseq_hash.options.sparse_options import SparseOptions

HASH = ("--router", "hash", "--sparse-layers", "1", "--num-experts", "4")
SWITCH = ("--router", "switch", *HASH[2:])
TOPK = ("--router", "topk", *HASH[2:])
REPLICAS = ("--expert-placement", "balanced", "--expert-replicas", "2")

BAD = [
    (
        ("--router", "hsah"),
        "--router hsah is unknown; use one of none, hash, base, expert-choice, gshard, random-linear, ",
    ),
    ((*HASH, "--num-experts", "0"), "--num-experts 0 is out of range; give a number of 1 or more"),
    ((*HASH, "--num-experts", "-3"), "--num-experts -3 is out of range"),
    ((*HASH, "--sparse-layers", "2"), "--sparse-layers 2: layer 2 does not exist; the decoder has layers 0 to 1"),
    ((*HASH, "--sparse-layers", "0,-1"), "layer -1 does not exist"),
    ((*HASH, "--sparse-layers", "1,1"), "--sparse-layers 1,1 names a layer twice"),
    ((*HASH, "--sparse-layers", "one"), "--sparse-layers one is not a list of layer numbers"),
    (("--router", "switch"), "--router switch needs --sparse-layers"),
    ((*HASH, "--sparse-placement", "instead"), "--sparse-placement instead is unknown; use one of replace, insert"),
    ((*HASH, "--expert-sublayers", "2"), "--expert-sublayers 2 needs --sparse-placement insert"),
    ((*HASH, "--sparse-placement", "insert", "--expert-sublayers", "0"), "--expert-sublayers 0 is out of range"),
    ((*HASH, "--hash-table", "missing.safetensors"), "missing.safetensors is neither a builder's name nor an existing"),
    ((*HASH, "--hash-seed", "-1"), "--hash-seed -1 is out of range"),
    ((*SWITCH, "--capacity-factor", "-0.5"), "--capacity-factor -0.5 is out of range; give a number of 0 or more"),
    ((*SWITCH, "--capacity-factor", "nan"), "--capacity-factor nan is out of range"),
    ((*SWITCH, "--eval-capacity-factor", "-1"), "--eval-capacity-factor -1.0 is out of range"),
    ((*SWITCH, "--router-jitter", "1"), "--router-jitter 1.0 is out of range"),
    (
        ("--router", "stablemoe", *HASH[2:], "--stable-updates", "0"),
        "--stable-updates 0 is out of range",
    ),
    (("--router", "stablemoe", *HASH[2:], "--stable-width", "-1"), "--stable-width -1 is out of range"),
    (("--router", "stablemoe", *HASH[2:], "--distill-weight", "nan"), "--distill-weight nan is out of range"),
    (("--router", "random-linear", *HASH[2:], "--router-jitter", "0.1"), "--router-jitter 0.1 needs a switch layer"),
    ((*SWITCH, "--expert-dropout", "1.5"), "--expert-dropout 1.5 is out of range"),
    ((*SWITCH, "--load-balance-weight", "-1"), "--load-balance-weight -1.0 is out of range"),
    ((*SWITCH, "--z-loss-weight", "inf"), "--z-loss-weight inf is out of range"),
    ((*SWITCH, "--gate", "1"), "--gate 1 is unknown; use one of value, one"),
    ((*SWITCH, "--base-evaluation", "best"), "--base-evaluation best is unknown; use one of greedy, balanced"),
    ((*SWITCH, "--drop-priority", "last"), "--drop-priority last is unknown; use one of position, random"),
    (
        (*HASH, "--expert-layer-norm", "--sparse-placement", "insert"),
        "--expert-layer-norm needs experts in place of an FFN; use --sparse-placement replace",
    ),
    ((*TOPK, "--experts-per-token", "5"), "--experts-per-token 5 is out of range; give 1 to 4, the number of experts"),
    ((*TOPK, "--balancing", "aux"), "--balancing aux is unknown; use one of none, loss, bias, quantile"),
    ((*TOPK, "--router-score", "relu"), "--router-score relu is unknown; use one of softmax, sigmoid, sqrt-softplus"),
    ((*TOPK, "--router-scale", "0"), "--router-scale 0.0 is out of range; give a number above 0"),
    ((*TOPK, "--balancing", "bias", "--bias-step", "nan"), "--bias-step nan is out of range; give a number of 0 or mo"),
    ((*TOPK, "--balancing", "bias", "--bias-step", "-1"), "--bias-step -1.0 is out of range"),
    ((*TOPK, "--balancing", "quantile", "--quantile-smoothing", "1"), "--quantile-smoothing 1.0 is out of range"),
    (
        (*TOPK, "--balancing", "quantile", "--experts-per-token", "4"),
        "--balancing quantile needs an expert that is not chosen, and --experts-per-token 4 chooses all 4; give fewer",
    ),
    (
        (*TOPK, "--balancing", "quantile", "--router-score", "sqrt-softplus"),
        "--balancing quantile needs scores from 0 to 1, which --router-score sqrt-softplus has not; use sigmoid or s",
    ),
    ((*TOPK, "--sequence-loss", "--sequence-loss-weight", "-1"), "--sequence-loss-weight -1.0 is out of range"),
    ((*HASH, "--base-layers", "1"), "use --router base --sparse-placement insert"),
    ((*HASH, "--decoder-layerdrop", "0.1"), "--decoder-layerdrop 0.1"),
    ((*HASH, "--decoder-layers-to-keep", "0"), "--decoder-layers-to-keep 0"),
    ((*HASH, "--quant-noise-pq", "0.1"), "--quant-noise-pq 0.1"),
    ((*HASH, "--scale-fc"), "--scale-fc"),
    ((*HASH, "--expert-replicas", "-1"), "--expert-replicas -1 is out of range; give a number of 0 or more"),
    (
        (*HASH, "--expert-replicas", "2"),
        "--expert-replicas 2 copies the experts with the largest loads; give these by --expert-placement balanced, or",
    ),
    ((*SWITCH, *REPLICAS), "--expert-placement balanced needs the tables of hash layers, and --router switch has none"),
    (
        (*HASH, *REPLICAS, "--expert-dispatch", "fairscale"),
        "--expert-replicas 2 does not go with --expert-dispatch fairscale; use all-to-all",
    ),
    ((*HASH, *REPLICAS, "--memory-layers", "1"), "--expert-replicas 2 does not go with --memory-layers, whose rows"),
    ((*HASH, *REPLICAS), "--expert-placement balanced chooses which experts share a rank; here each of 1 holds all"),
    (("--expert-replicas", "2"), "--expert-replicas 2 needs experts (a --router other than none), and no --router is "),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_options_end_in_one_line(data, arguments, message):
    with pytest.raises(SystemExit) as ended:
        build(data, *arguments)
    line = str(ended.value)
    assert line.startswith("fairseq_hash: ") and message in line and "\n" not in line


def test_the_command_shows_the_line_and_no_traceback(data, tmp_path):
    """For a bad value, a table of another dictionary, and a dictionary without counts."""
    bare = shutil.copytree(data, tmp_path / "bare")
    (bare / "dict.txt").write_text(re.sub(r"(?m) \d+$", " 1", (data / "dict.txt").read_text()))
    table = hashing.build_table("random", [f"word{i}" for i in range(10)], [1] * 10, hashing.TableShape(4), 0)
    hashing.save_table(table, tmp_path / "foreign.safetensors")
    cases = [
        (data, ("--router", "hsah"), "--router hsah is unknown"),
        (data, (*HASH, "--hash-table", tmp_path / "foreign.safetensors"), "built for another dictionary"),
        (bare, HASH, "the dictionary has no token counts"),
    ]
    for folder, arguments, message in cases:
        done = train(folder, tmp_path / "run", *arguments, check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("fairseq_hash: ") and message in last
        assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.glob("run/*"))


def test_a_table_with_experts_out_of_range_is_refused(data, tmp_path):
    _, task, _, _ = build(data)
    known = task.source_dictionary.symbols, task.source_dictionary.count
    table = hashing.build_table("random", *known, hashing.TableShape(8), 0)
    path = tmp_path / "eight.safetensors"
    hashing.save_table(table, path)
    with pytest.raises(SystemExit, match="built for 8 experts, but --num-experts is 4"):
        build(data, *HASH, "--hash-table", path)
    # The record can lie as well.
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    metadata["record"] = metadata["record"].replace('"num_experts": 8', '"num_experts": 4')
    save_file({"expert": table.expert_HK}, path, metadata)
    with pytest.raises(SystemExit, match="names expert 7, but there are experts 0 to 3"):
        build(data, *HASH, "--hash-table", path)


def test_an_unsupported_fairseq_is_refused(monkeypatch):
    import fairseq

    from fairseq_hash.fairseq_patches import upstream

    monkeypatch.setattr(fairseq, "__version__", "0.12.2+anything")
    upstream.require_supported_fairseq()
    monkeypatch.setattr(fairseq, "__version__", "0.10.2")
    with pytest.raises(SystemExit, match="fairseq 0.10.2 is not supported; install fairseq 0.12.2"):
        upstream.require_supported_fairseq()


def test_base_scores_that_are_not_finite_end_the_run(data):
    _, task, model, _ = build(data, "--router", "base", *HASH[2:])
    with torch.no_grad():
        model.decoder.layers[1].sparse.router.centroids[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"(?i)nan"):
        model(torch.randint(4, 50, (2, 8)))


@pytest.mark.parametrize("options", [SparseOptions, HashMoECriterionConfig])
def test_every_option_has_a_help_text(options):
    for option in fields(options):
        if option.name not in ("_name", "sentence_avg"):
            assert len(option.metadata["help"]) > 20, option.name
