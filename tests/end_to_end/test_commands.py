"""The real commands: prepare, train, stop, resume, evaluate, on one process and on two."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra_configs import needs_current_hydra
from plugin import ROUTERS, USER_DIR, command, evaluate, losses, on_ranks, records, train, train_arguments

from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.evaluate import evaluate_run
from fairseq_hash.experiments.flags import flags
from fairseq_hash.reporting.runs import load_run


def parameters(path):
    return torch.load(path, weights_only=True)["model"]


def test_dense_and_one_expert_train_as_transformer_lm(data, tmp_path):
    """The same loss at every update; the same parameters at the end.

    With no router to the bit. With one expert the gradients are the same numbers in tensors of another order, so their
    norm, by which they are clipped, is summed in another order: an ulp or so an update, magnified by Adam. (A key bias
    has no gradient but rounding noise, which Adam scales up to full steps.)
    """
    sizes = "--decoder-input-dim 16 --decoder-output-dim 16 --dropout 0 --share-decoder-input-output-embed"
    original = f"--arch transformer_lm --criterion cross_entropy {sizes} --decoder-normalize-before".split()
    runs = {
        "transformer_lm": original,
        "none": (),
        "hash": ("--router", "hash", "--sparse-layers", "0,1", "--num-experts", "1"),
    }
    logs = {name: train(data, tmp_path / name, *arguments) for name, arguments in runs.items()}
    assert len(losses(logs["none"])) == 8
    assert losses(logs["none"]) == losses(logs["hash"]) == losses(logs["transformer_lm"])
    saved = {name: parameters(tmp_path / name / "checkpoint_last.pt") for name in runs}
    assert list(saved["none"]) == list(saved["transformer_lm"])
    for name, value in saved["transformer_lm"].items():
        if not name.endswith("_float_tensor"):
            assert torch.equal(saved["none"][name], value), name
        if ".fc" not in name and not name.endswith(("_float_tensor", "k_proj.bias")):
            torch.testing.assert_close(saved["hash"][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("router", ROUTERS)
def test_train_stop_resume_evaluate(data, tmp_path, router):
    """Eight updates in one go equal four, a stop, and four more; eval-lm gives the trainer's validation loss."""
    arguments = (*ROUTERS[router], "--save-interval-updates", "4", "--tensorboard-logdir", tmp_path / "tensorboard")
    whole = train(data, tmp_path / "whole", *arguments)
    train(data, tmp_path / "halves", *arguments, "--max-update", "4")
    resumed = train(data, tmp_path / "halves", *arguments)
    assert losses(resumed) == losses(whole)[4:] and len(losses(whole)) == 8
    final = parameters(tmp_path / "whole" / "checkpoint_last.pt")
    for name, value in parameters(tmp_path / "halves" / "checkpoint_last.pt").items():
        if not name.endswith("_float_tensor"):
            assert torch.equal(value, final[name]), name

    valid = records(whole, "valid")[-1]
    assert "valid_layer1_load_max" in valid and "valid_layer1_dropped" in valid
    evaluated = evaluate(data, tmp_path / "whole" / "checkpoint_last.pt")
    loss = re.search(r"Loss \(base 2\): ([\d.]+)", evaluated.stdout + evaluated.stderr).group(1)
    # The trainer prints three decimals.
    assert float(loss) == pytest.approx(float(valid["valid_loss"]), abs=1.1e-3)
    assert list((tmp_path / "tensorboard" / "train_inner").iterdir())


def test_the_model_record_is_in_the_log(data, tmp_path):
    done = train(data, tmp_path, *ROUTERS["hash"], "--max-update", "1", "--disable-validation", "--no-save")
    record = json.loads(re.search(r"model_record \| (\{.*\})", done.stdout + done.stderr).group(1))
    assert record["router"] == "hash" and record["sparse_layers"] == [1] and record["num_experts"] == 4
    assert record["parameters_total"] - record["parameters_active"] == 3 * (16 * 32 * 2 + 32 + 16)
    assert re.fullmatch("[0-9a-f]{64}", record["dictionary_fingerprint"])
    # A build such as 2.11.0+cu130 can be installed as 2.11.0.
    assert record["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.fixture(scope="module")
def exact(data, tmp_path_factory):
    """The losses of a training in fp32."""
    return losses(train(data, tmp_path_factory.mktemp("full"), *ROUTERS["switch"], "--no-save"))


@pytest.mark.parametrize("precision", ["--bf16", "--memory-efficient-bf16", "--memory-efficient-fp16", "--fp16"])
def test_half_precision_trains(data, tmp_path, exact, precision):
    """On a CPU; fairseq flattens fp16 parameters on CUDA only, so there --fp16 goes with --fp16-no-flatten-grads."""
    arguments = (*ROUTERS["switch"], "--no-save", precision)
    done = train(data, tmp_path / "half", *arguments, *(("--fp16-no-flatten-grads",) if precision == "--fp16" else ()))
    assert len(losses(done)) == 8
    # Losses near 5 after a few updates; bf16 has 8 bits, and routes may differ.
    assert [float(x) for x in losses(done)] == pytest.approx([float(x) for x in exact], abs=0.1)


@needs_current_hydra
def test_hydra_train_is_the_same_run(data, tmp_path):
    """An experiment of `configs/` by fairseq-hydra-train, and by the flags that `fairseq-hash plan` makes of it."""
    small = [f"task.data='{data}'", "task.tokens_per_sample=16", "dataset.max_tokens=256", "optimization.max_update=8"]
    small += ["model.decoder_layers=2", "model.decoder_embed_dim=16", "model.decoder_ffn_embed_dim=32"]
    small += ["model.router='hash,switch'", "model.sparse_layers='0,1'", "model.num_experts=4", "common.log_interval=1"]
    small += ["common.seed=5", f"common.user_dir='{USER_DIR}'"]
    configs = Path(__file__).parents[2] / "configs"
    words = flags(compose(configs, "laptop/switch", [*small, "checkpoint.no_save=true"]).config)
    by_flags = command("train", *words)
    folder = f"hydra.run.dir='{tmp_path / 'a run'}'"
    by_hydra = command("hydra_train", "--config-dir", configs, "--config-name", "laptop/switch", folder, *small)
    assert losses(by_hydra) == losses(by_flags) and len(losses(by_hydra)) == 8
    log = (tmp_path / "a run" / "rank0.log").read_text()
    assert "train_inner" in log and "'name': 'Switch'" in log
    assert (tmp_path / "a run" / ".hydra" / "overrides.yaml").is_file()

    # Evaluated as it was trained, into the file where reports look for it; a second call has nothing to do.
    told = []
    for _ in range(2):
        evaluate_run(tmp_path / "a run", ["valid"], "best", again=False, tell=told.append)
    validated = float(records(by_hydra, "valid")[-1]["valid_ppl"])
    assert load_run(tmp_path / "a run").evaluations["valid"].perplexity == pytest.approx(validated, abs=0.02)
    assert told[1].endswith("as evaluated before") and not list((tmp_path / "a run").glob("*.partial"))
    with pytest.raises(UserError, match="has no checkpoint_other.pt"):
        evaluate_run(tmp_path / "a run", ["valid"], "other", again=False, tell=told.append)
    with pytest.raises(UserError, match="fairseq-eval-lm failed with status 1: fairseq_hash: .* has no subset none"):
        evaluate_run(tmp_path / "a run", ["none"], "best", again=False, tell=told.append)
    assert not (tmp_path / "a run" / "eval-none.log").exists()


def test_two_processes_train_as_one_and_one_evaluates(data, tmp_path):
    """Shared experts under a launcher, with fairseq's default data parallel: the losses of one process with
    the same options (--update-freq-ranks makes two batches an update on one process, and one on each of two), and a
    checkpoint that one process evaluates as the two did.

    The hash router decides token by token, so nothing depends on how the batch is cut. Losses are printed with three
    decimals; the gradients are summed in another order.
    """
    batch = ("--update-freq", "2", "--update-freq-ranks", "1")
    one = train(data, tmp_path / "one", *ROUTERS["hash"], *batch, "--no-save")
    arguments = train_arguments(data, tmp_path / "two", *ROUTERS["hash"], *batch, "--distributed-backend", "gloo")
    done, other = on_ranks(2, "-m", "fairseq_cli.train", *arguments)
    assert done.returncode == other.returncode == 0, done.stderr[-3000:]
    assert "2 ranks share 4 experts: rank 0: 0 to 1; rank 1: 2 to 3" in done.stdout + done.stderr
    assert [float(x) for x in losses(done)] == pytest.approx([float(x) for x in losses(one)], abs=2e-3)
    loads = [[r["layer1_load_max"] for r in records(run, "train_inner")] for run in (done, one)]
    assert loads[0] == loads[1]
    path = tmp_path / "two" / "checkpoint_last.pt"
    evaluated = evaluate(data, path)
    perplexity = float(re.search(r"Perplexity: ([\d.]+)", evaluated.stdout + evaluated.stderr)[1])
    assert perplexity == pytest.approx(float(records(done, "valid")[-1]["valid_ppl"]), abs=0.02)
