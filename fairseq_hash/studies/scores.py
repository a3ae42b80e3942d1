"""The score of every token of a split, by fairseq's own evaluation.

Shape suffix: S tokens of a stream.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import fairseq_hash
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.quiet import only_warnings
from fairseq_hash.hashing.dictionary import read_dictionary
from fairseq_hash.table_tools.token_streams import open_text

IN_THIS_PROCESS = ("--cpu", "--num-workers", "0", "--log-format", "none", "--distributed-world-size", "1")


def token_nats(
    checkpoint: Path,
    data: Path,
    subset: str,
    max_tokens: int,
    model_options: Mapping[str, Any] = MappingProxyType({}),
) -> np.ndarray:
    """Return minus the natural logarithm of the probability of every token of a split, as fairseq-eval-lm scores it.

    `fairseq-eval-lm DATA --path CHECKPOINT --gen-subset SUBSET --max-tokens N` runs in this process, in fp32 on the
    CPU: it cuts the text as the training did, and makes the same batches, which capacity and balanced assignment see.

    Args:
        checkpoint: the main file, if the experts are in shards, or a plain file.
        data: folder of binarized data with the dictionary of the training.
        subset: a split of it, such as valid.
        max_tokens: the most tokens of a batch.
        model_options: options of the model to change for this evaluation, as by --model-overrides.

    Returns:
        float32 `[S]`, in the order of the text.

    Raises:
        UserError: if a file is missing or damaged, an option is unknown, a token has no finite score, or samples (or
            the ends of documents, with --sample-break-mode complete_doc) would be left out.
    """
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist; give a checkpoint of fairseq-train")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; give the most tokens of a batch, 1 or more")
    symbols, _ = read_dictionary(data / "dict.txt")
    tokens = sum(map(len, open_text(data, subset, symbols).blocks()))
    words = [str(data), "--path", str(checkpoint), "--gen-subset", subset, "--max-tokens", str(max_tokens)]
    score_of = _evaluated([*words, "--model-overrides", repr(dict(model_options)), *IN_THIS_PROCESS])
    nats_S = -np.concatenate([score_of[sample] for sample in sorted(score_of)])
    if len(nats_S) != tokens:
        raise UserError(
            f"{checkpoint} scores {len(nats_S):,} of the {tokens:,} tokens of {data / subset}: the way in which its "
            "training cut text into samples leaves tokens out; give a model of --sample-break-mode none"
        )
    return nats_S


def _evaluated(words: Sequence[str]) -> dict[int, np.ndarray]:
    """Run fairseq-eval-lm; return the logarithms of the tokens' probabilities, float32, by the numbers of samples."""
    fairseq_hash.register()
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq.sequence_scorer import SequenceScorer

    from fairseq_hash.checkpoint.loading import one_line
    from fairseq_hash.fairseq_patches.registry import replaced

    evaluation = import_module("fairseq_cli.eval_lm")
    fairseq_hash.register()  # what replaces functions of a command is applied once the command is imported

    score_of: dict[int, np.ndarray] = {}
    generate = SequenceScorer.generate

    def recorded(scorer: SequenceScorer, models: list[Any], sample: dict[str, Any], **kwargs: Any) -> Any:
        scored = generate(scorer, models, sample, **kwargs)
        for number, (best, *_) in zip(sample["id"].tolist(), scored, strict=True):
            score_of[number] = best["positional_scores"].float().numpy()[skipped:]
        return scored

    try:
        with only_warnings("fairseq", "fairseq_cli", "fairseq_hash"), replaced(SequenceScorer, "generate", recorded):
            parsed = options.parse_args_and_arch(options.get_eval_lm_parser(), words)
            skipped = int(parsed.add_bos_token)  # <s> before each sample, which is no token of the text
            evaluation.main(convert_namespace_to_omegaconf(parsed))
    except SystemExit as error:  # the error line of a function that fairseq calls
        raise UserError(str(error).removeprefix("fairseq_hash: ")) from error
    except RuntimeError as error:  # torch's, of tensors that differ in shape
        raise UserError(f"the checkpoint does not fit the data or the options: {one_line(error)}") from error
    return score_of
