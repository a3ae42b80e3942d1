"""The count of `</s>`, which a dict.txt does not have: how many lines the training text has."""

from pathlib import Path

from fairseq import utils
from fairseq.data import data_utils
from fairseq.tasks import FairseqTask

from fairseq_hash.core.errors import UserError


def counts_with_line_ends(task: FairseqTask, option: str = "--hash-count-eos") -> list[int]:
    """Return how often each of the V symbols occurs by the task's dictionary, but `</s>` once for each line of text.

    `fairseq-preprocess` ends every line with `</s>`, and leaves its count out of dict.txt: fairseq reads it as 1. Every
    `</s>` also is an input once: before the next line, or at the beginning of a sample of whole lines. The lines are
    those of the subset `train` (and `train1`, ...) in all folders of the task's data: the text that dict.txt counts.
    `option` is the one that asks for them.

    Raises:
        UserError: if a folder has no such subset.
    """
    folders = utils.split_paths(task.args.data)
    counts = list(task.source_dictionary.count)
    counts[task.source_dictionary.eos()] = sum(_lines(Path(folder), task, option) for folder in folders)
    return counts


def _lines(folder: Path, task: FairseqTask, option: str) -> int:
    text = data_utils.load_indexed_dataset(
        str(folder / "train"), task.source_dictionary, task.args.dataset_impl, combine=True
    )
    if text is None:
        raise UserError(
            f"{option} counts the lines of the training text, and {folder} has no binarized train; leave it out, or "
            "give a file that was made with --text (fairseq-hash tables build, plan --loads)"
        )
    return len(text)
