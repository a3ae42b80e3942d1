"""The functions of fairseq that the overrides were written against, by a hash of their source.

An override of a function that has changed may be wrong, and nothing else would say so. After looking at each function
that is named, make the table anew, and put what this prints in its place:

    python -m fairseq_hash.fairseq_patches.print_sources
"""

import hashlib
import inspect
from typing import Any

import fairseq

SUPPORTED_FAIRSEQ = "0.12.2"
INSTALL = f"install fairseq {SUPPORTED_FAIRSEQ} (scripts/build_fairseq.py builds it for current Python)"

# Target of an override -> the first 16 digits of the SHA-256 of its source, by `hash_of`.
SOURCES: dict[str, str] = {
    "fairseq.checkpoint_utils.PathManager": "fcdb1092256ddb74",
    "fairseq.checkpoint_utils.load_checkpoint": "b2de192b7167fd3a",
    "fairseq.checkpoint_utils.load_checkpoint_to_cpu": "a828b75b83835405",
    "fairseq.checkpoint_utils.load_ema_from_checkpoint": "06b1ebc2764cfed1",
    "fairseq.checkpoint_utils.load_model_ensemble_and_task": "7398a8f21b563199",
    "fairseq.checkpoint_utils.overwrite_args_by_name": "77c5399ac16d1495",
    "fairseq.checkpoint_utils.save_checkpoint": "70e0ec2ea1a5951e",
    "fairseq.checkpoint_utils.torch_persistent_save": "781847e229fc9a51",
    "fairseq.dataclass.utils.merge_with_parent": "4d7eb753de9acec2",
    "fairseq.distributed.LegacyDistributedDataParallel.all_reduce_grads": "22c86edf1d4dc4bf",
    "fairseq.distributed.utils._broadcast_object_slow": "0faef6da9c68299b",
    "fairseq.distributed.utils._infer_slurm_init": "377cab46e2986d1b",
    "fairseq.distributed.utils.call_main": "086fda407a117400",
    "fairseq.distributed.utils.distributed_init": "4e59e7e5f50eea61",
    "fairseq.hub_utils.from_pretrained": "7fd24d213b04a406",
    "fairseq.logging.progress_bar.TensorboardProgressBarWrapper._log_to_tensorboard": "8996cebb344462b6",
    "fairseq.models.build_model": "3b9babfdb0eb12e9",
    "fairseq.models.ema.ema.EMA._step_internal": "392451129a80115f",
    "fairseq.optim.fairseq_optimizer.FairseqOptimizer.multiply_grads": "dd5955100aaffcb1",
    "fairseq.optim.fp16_optimizer._FP16OptimizerMixin.__init__": "7b739f6b183d3285",
    "fairseq.optim.fp16_optimizer._FP16OptimizerMixin._sync_fp16_grads_to_fp32": "cdd5e3d7124dfa6a",
    "fairseq.optim.fp16_optimizer._FP16OptimizerMixin._sync_fp32_params_to_fp16": "fd827d8733753bb5",
    "fairseq.optim.fp16_optimizer._FP16OptimizerMixin.step": "7f3c0bd85ed8f7d9",
    "fairseq.optim.fp16_optimizer._FP16OptimizerMixin.zero_grad": "be4a00b0384e1acf",
    "fairseq.options.parse_args_and_arch": "989a96797b68f998",
    "fairseq.tasks.language_modeling.LanguageModelingTask.eval_lm_dataloader": "af35af120f719ee4",
    "fairseq.tasks.language_modeling.LanguageModelingTask.filter_indices_by_size": "d5c42a12493fdf01",
    "fairseq.tasks.language_modeling.LanguageModelingTask.get_batch_iterator": "7f2c795917eeca60",
    "fairseq.tasks.language_modeling.LanguageModelingTask.load_dataset": "19e3c00dfecd903d",
    "fairseq.tasks.language_modeling.LanguageModelingTask.setup_dictionary": "c72bd7065a2ecb35",
    "fairseq.trainer.Trainer.__init__": "7b5c6d8221cc048f",
    "fairseq.trainer.Trainer._aggregate_logging_outputs": "06451681e3c9db5c",
    "fairseq.trainer.Trainer._build_optimizer": "4e36d7374d5eb3cb",
    "fairseq.trainer.Trainer._reduce_and_log_stats": "c0b2c4ad38fbe5b9",
    "fairseq.trainer.Trainer.clip_grad_norm": "0fd33741bb74a4a0",
    "fairseq.trainer.Trainer.get_train_iterator": "9e7a8f7b6c421536",
    "fairseq.trainer.Trainer.load_checkpoint": "a3c935b3e1112fc4",
    "fairseq.trainer.Trainer.save_checkpoint": "c638bddbfa31add4",
    "fairseq.trainer.Trainer.state_dict": "a08330f6f79a9bda",
    "fairseq.trainer.Trainer.train_step": "51374f14a8740999",
    "fairseq.utils.clip_grad_norm_": "3e42adf93038c65d",
    "fairseq.utils.import_user_module": "37f25377c4b52c9c",
    "fairseq.utils.multi_tensor_total_norm": "6f34d42c978a912a",
    "fairseq_cli.eval_lm.eval_lm": "f9de52372662a72a",
    "fairseq_cli.train.add_defaults": "65fa8ec2137376a7",
    "fairseq_cli.train.train": "b68e39769c3e4f6f",
    "fairseq_cli.train.validate_and_save": "ea41ae42de4c01f4",
}
# The same of the release on PyPI, for what scripts/build_fairseq.py rewrites.
OF_THE_RELEASE = {"fairseq.utils.import_user_module": "15f30ce5c978f783"}


def source_hash(original: Any) -> str:
    """Return the hash of a function's or class's source; "" if its source is not there."""
    try:
        return hash_of(inspect.getsource(original) if inspect.isclass(original) else function_source(original))
    except OSError:
        return ""


def function_source(function: Any) -> str:
    """Return the lines of a function, found by their indentation: `inspect` takes 0.2 s for all, at every start."""
    lines, start = inspect.findsource(inspect.unwrap(function))
    indent = len(lines[start]) - len(lines[start].lstrip())
    header = next(place for place in range(start, len(lines)) if lines[place].lstrip().startswith("def "))
    for end in range(header + 1, len(lines)):
        is_inside = lines[end][: indent + 1].isspace() or lines[end].lstrip().startswith(")")
        if not is_inside:
            return "".join(lines[start:end])
    return "".join(lines[start:])


def hash_of(text: str) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a text, each run of white space being one space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


def is_fairseqs(original: Any) -> bool:
    """Return whether this is a function or a class of fairseq's, not a value and not another library's."""
    has_source = inspect.isroutine(original) or inspect.isclass(original)
    return has_source and original.__module__.partition(".")[0] in ("fairseq", "fairseq_cli", "__main__")


def is_known(target: str, original: Any) -> "bool | None":
    """Return whether the source of a target is the known one; None for what is not a function or class of fairseq's."""
    if not is_fairseqs(original):
        return None
    return source_hash(original) in (SOURCES.get(target), OF_THE_RELEASE.get(target))


def require_supported_fairseq() -> None:
    """Raise `SystemExit` with one line unless this fairseq is the release that the plugin was written against."""
    if fairseq.__version__.split("+")[0] != SUPPORTED_FAIRSEQ:
        raise SystemExit(f"fairseq_hash: fairseq {fairseq.__version__} is not supported; {INSTALL}")
