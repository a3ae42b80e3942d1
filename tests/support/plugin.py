"""How tests drive fairseq with the plugin: in this process for models, by the real commands for runs."""

import json
import re
import shutil
from pathlib import Path

import forked
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap

import fairseq_hash

fairseq_hash.register()  # where the package was imported before fairseq, --user-dir does nothing
USER_DIR = str(Path(fairseq_hash.__file__).parent)
TINY = ("--arch", "hash_transformer_lm_tiny", "--decoder-layers", "2", "--decoder-embed-dim", "16")
TINY += ("--decoder-ffn-embed-dim", "32", "--decoder-attention-heads", "2", "--criterion", "hash_moe")
SPARSE = ("--sparse-layers", "1", "--num-experts", "4")
ROUTERS = {
    "hash": ("--router", "hash", *SPARSE),
    "switch": ("--router", "switch", *SPARSE, "--capacity-factor", "1.25", "--router-jitter", "0.01"),
    "base": ("--router", "base", *SPARSE, "--sparse-placement", "insert", "--expert-sublayers", "2"),
}


def build(data, *arguments, on_cpu=True, for_evaluation=False):
    """Return (cfg, task, model, criterion) for `fairseq-train` arguments; a later argument replaces an earlier one."""
    fixed = [str(data), "--task", "language_modeling", "--user-dir", USER_DIR, "--tokens-per-sample", "16"]
    fixed += ["--cpu"] if on_cpu else []
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, [*fixed, *TINY, *map(str, arguments)])
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    if cfg.distributed_training.ddp_backend == "fully_sharded":
        with fsdp_enable_wrap(cfg.distributed_training):
            model = fsdp_wrap(task.build_model(cfg.model, for_evaluation))
    else:
        model = task.build_model(cfg.model, for_evaluation)
    return cfg, task, model, task.build_criterion(cfg.criterion)


def swap_words(data, folder):
    """Copy a corpus, with the first two words of its dictionary in each other's place; return the folder."""
    shutil.copytree(data, folder)
    words = (data / "dict.txt").read_text().splitlines(keepends=True)
    (folder / "dict.txt").write_text("".join([*words[1::-1], *words[2:]]))
    return folder


def command(name, *arguments, check=True):
    """Run `python -m fairseq_cli.NAME` with the arguments; return the finished process with its output as text."""
    words = ["-m", f"fairseq_cli.{name}", *arguments]
    done = forked.run_python(words, 600, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def train_arguments(data, save_dir, *arguments):
    """Return the arguments of a short `fairseq-train` of the tiny model; a later argument replaces an earlier one."""
    fixed = [data, "--task", "language_modeling", "--user-dir", USER_DIR, "--cpu", "--tokens-per-sample", "16"]
    fixed += ["--max-tokens", "256", "--optimizer", "adam", "--lr", "3e-3", "--clip-norm", "0.5", "--seed", "5"]
    fixed += ["--log-format", "json", "--log-interval", "1", "--max-update", "8", "--save-dir", save_dir]
    return [*fixed, *TINY, *arguments]


def train(data, save_dir, *arguments, check=True):
    """Run `fairseq-train` of the tiny model; return the finished process."""
    return command("train", *train_arguments(data, save_dir, *arguments), check=check)


def records(done, tag):
    """Return the JSON records that a command logged under a tag such as train_inner or valid."""
    # fairseq's own format, or Hydra's.
    lines = re.findall(rf"(?:\| INFO \| {tag} \||\[{tag}\]\[INFO\] -) (\{{.*\}})", done.stdout + done.stderr)
    return [json.loads(line) for line in lines]


def losses(done):
    """Return the logged loss of every update."""
    return [record["loss"] for record in records(done, "train_inner")]


def on_ranks(world_size, *words):
    """Run `python WORDS` on several ranks; return the finished processes."""
    return forked.run_ranks([words] * world_size, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def evaluate(data, path, *arguments, check=True):
    """Run `fairseq-eval-lm` of a checkpoint."""
    fixed = [data, "--task", "language_modeling", "--user-dir", USER_DIR, "--path", path, "--gen-subset", "valid"]
    fixed += ["--tokens-per-sample", "16", "--max-tokens", "256", "--cpu"]
    return command("eval_lm", *fixed, *arguments, check=check)
