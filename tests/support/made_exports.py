"""Models with random weights, saved by fairseq's trainer and exported: what the tests of exports share."""

import functools
import tempfile

import recorded
import torch
from called import call
from fairseq import checkpoint_utils

TINY = ("--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "48", "--decoder-attention-heads", "4")
TINY += ("--decoder-input-dim", "32", "--decoder-output-dim", "32")
SPARSE = ("--sparse-layers", "0,1", "--num-experts", "4")
PADDING, END = 1, 2
POSITIONS = 16
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def hash_layers(*more):
    return ("--router", "hash", *SPARSE, "--hash-table", "random", *more)


def feature(name, *more):
    buckets = ("--hash-buckets", "50") if name in ("bigram", "ngram", "history") else ()
    return hash_layers("--hash-feature", name, *buckets, *more)


def save(data, folder, *arguments):
    """Save a model with random weights; return its main file, the model in evaluation, and its task."""
    trainer, epoch_itr = recorded.make_trainer(data, (*TINY, *arguments, "--save-dir", folder))
    model = trainer.get_model()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if name.endswith("norm.weight") or "norm_weight" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
        for name in ("embed_tokens", "embed_positions"):
            table = getattr(model.decoder, name)
            if isinstance(table, torch.nn.Embedding):
                table.weight[PADDING] = 0
    epoch_itr.next_epoch_itr(shuffle=False)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    return folder / "checkpoint_last.pt", model.eval(), trainer.task


def export(checkpoint, out, *arguments):
    """Export, and return the folder."""
    status, said, err = call("export", checkpoint, "--to", "hf", out, *arguments)
    assert (status, err) == (0, "") and said == f"wrote {out}\n", err
    return out


@functools.cache
def modules():
    """Let transformers copy the Python files that it imports to a folder of this process, and return that folder."""
    from transformers import dynamic_module_utils

    folder = tempfile.TemporaryDirectory()
    dynamic_module_utils.HF_MODULES_CACHE = folder.name
    return folder


def load(folder, **options):
    """Return the exported model, in evaluation; with `output_loading_info`, and what transformers says of it."""
    from transformers import AutoModelForCausalLM

    modules()
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return loaded if options.get("output_loading_info") else loaded.eval()


def sentences(task, rows=3, length=10, seed=0):
    """Return random sentences, each with the end of a sentence in front, and their copy with padding behind."""
    generator = torch.Generator().manual_seed(seed)
    token_BL = torch.randint(3, len(task.source_dictionary), (rows, length), generator=generator)
    token_BL[:, 0] = END
    padded_BL = token_BL.clone()
    for row in range(rows):
        padded_BL[row, length - row :] = PADDING
    return token_BL, padded_BL
