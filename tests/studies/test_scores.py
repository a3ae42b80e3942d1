"""Scores of single tokens beside what fairseq-eval-lm prints, and beside a naive loop over samples."""

import logging
import math
import re
import shutil
import sys

import numpy as np
import pytest
import small_models
import torch
from fairseq import checkpoint_utils
from fairseq.models.fairseq_model import BaseFairseqModel
from fairseq_cli import eval_lm
from plugin import USER_DIR

from fairseq_hash.core.errors import UserError
from fairseq_hash.studies.scores import token_nats

MAX_TOKENS = 128  # eight samples of 16 tokens
SWITCH = ("--router", "switch", "--eval-capacity-factor", "0.5", *small_models.LAYERS)


@pytest.fixture(scope="module")
def switch(data, tmp_path_factory):
    """The checkpoint of a router that drops tokens in evaluation, too."""
    return small_models.train(data, tmp_path_factory.mktemp("switch"), "--lr", "0.05", *SWITCH)


@pytest.fixture
def printed(data, monkeypatch, caplog):
    """Return a function of a checkpoint and options: tokens, loss (base 2) and perplexity by fairseq-eval-lm."""

    def call(path, *words):
        fixed = [data, "--user-dir", USER_DIR, "--path", path, "--cpu", "--num-workers", "0"]
        fixed += ["--gen-subset", "test"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in ("fairseq", *fixed, *words)])
        caplog.clear()
        with caplog.at_level(logging.INFO):
            eval_lm.cli_main()
        said = "\n".join(caplog.messages)
        tokens, loss, perplexity = re.search(
            r"Evaluated ([\d,]+) tokens[\s\S]*Loss \(base 2\): ([\d.]+), Perplexity[^:]*: ([\d.]+)", said
        ).groups()
        return int(tokens.replace(",", "")), float(loss), float(perplexity)

    return call


def text_of(data, subset):
    """The ids of a split's words and ends of lines, from the text itself."""
    words = [line.rsplit(" ", 1)[0] for line in (data / "dict.txt").read_text().splitlines()]
    id_of = {word: number for number, word in enumerate(words, 4)}
    lines = (data.parent / f"{subset}.txt").read_text().splitlines()
    return [number for line in lines for number in (*(id_of[word] for word in line.split()), 2)]


@pytest.mark.parametrize("name", ["none", "hash", "switch", "base", "base balanced"])
def test_the_mean_is_what_eval_lm_prints(data, switch, printed, name):
    """Of capacity and of balanced assignment only in the same batches."""
    path = switch if name == "switch" else small_models.checkpoint(data, name.split()[0])
    changed = {"base_evaluation": "balanced"} if name == "base balanced" else {}
    nats_S = token_nats(path, data, "test", MAX_TOKENS, changed)
    tokens, loss, perplexity = printed(path, "--max-tokens", MAX_TOKENS, "--model-overrides", repr(changed))
    assert nats_S.dtype == np.float32 and nats_S.shape == (tokens,) and tokens == len(text_of(data, "test"))
    mean = nats_S.mean(dtype=np.float64)
    assert mean / math.log(2) == pytest.approx(loss, abs=6e-5)
    assert math.exp(mean) == pytest.approx(perplexity, rel=1e-4)
    others = token_nats(path, data, "test", 16, changed)  # each sample alone
    assert np.allclose(others, nats_S, atol=1e-5) == (name not in ("switch", "base balanced"))
    if changed:
        assert not np.allclose(token_nats(path, data, "test", MAX_TOKENS), nats_S, atol=1e-3)


def test_every_token_of_a_dense_model_is_that_of_a_naive_loop(data):
    """In the order of the text, whatever the order of the batches: each sample alone begins after `</s>` or a token."""
    path = small_models.checkpoint(data, "none")
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    model.eval()
    text = text_of(data, "test")
    expected = []
    for first in range(0, len(text), 16):
        target = torch.tensor(text[first : first + 16])
        source = torch.tensor([text[first - 1] if first else 2, *target[:-1].tolist()])
        with torch.no_grad():
            log_probability = model(source[None])[0][0].log_softmax(-1)
        expected += (-log_probability[torch.arange(len(target)), target]).tolist()
    nats_S = token_nats(path, data, "test", MAX_TOKENS)
    assert nats_S == pytest.approx(np.array(expected), abs=1e-5)


def test_bad_input_gets_one_line(data, tmp_path, monkeypatch):
    path = small_models.checkpoint(data, "hash")

    def refused(*arguments):
        with pytest.raises(UserError) as error:
            token_nats(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no.pt does not exist; give a checkpoint" in refused(tmp_path / "no.pt", data, "test", 64)
    assert f"{data} has no dev.idx" in refused(path, data, "dev", 64)
    assert f"{tmp_path / 'dict.txt'} does not exist" in refused(path, tmp_path, "test", 64)
    assert "max_tokens is 0; give the most tokens of a batch" in refused(path, data, "test", 0)
    assert "samples of test, with" in refused(path, data, "test", 8)  # no sample of 16 tokens fits into a batch
    assert "colour is no option of this checkpoint" in refused(path, data, "test", 64, {"colour": 1})
    other = shutil.copytree(data, tmp_path / "other")
    (other / "dict.txt").write_text((data / "dict.txt").read_text() + "more 1\n")
    assert "it belongs to dictionary" in refused(path, other, "test", 64)
    assert "those of this model (64, 16)" in refused(path, data, "test", 64, {"decoder_ffn_embed_dim": 64})
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:1000])
    assert "cut.pt" in refused(tmp_path / "cut.pt", data, "test", 64)
    original = BaseFairseqModel.get_normalized_probs

    def spoiled(*args, **kwargs):
        probabilities = original(*args, **kwargs)
        probabilities[..., 4] = -torch.inf  # the most frequent word
        return probabilities

    monkeypatch.setattr(BaseFairseqModel, "get_normalized_probs", spoiled)
    assert "the model gives a token no probability" in refused(path, data, "test", 64)


def test_ends_of_documents_that_have_no_score(data, tmp_path):
    """Blank lines, which are no tokens of the samples of documents."""
    documents = ("--sample-break-mode", "complete_doc", "--tokens-per-sample", "64")
    path = small_models.train(data, tmp_path / "model", *documents)
    assert len(token_nats(path, data, "test", 128)) == len(text_of(data, "test"))
    copy = shutil.copytree(data, tmp_path / "data")
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    builder = MMapIndexedDatasetBuilder(str(copy / "test.bin"), dtype=np.uint16)
    for line in ([4, 5, 2], [2], [5, 5, 2]):
        builder.add_item(torch.tensor(line))
    builder.finalize(str(copy / "test.idx"))
    with pytest.raises(UserError, match=r"scores 6 of the 7 tokens of .*; give a model of --sample-break-mode none"):
        token_nats(path, copy, "test", 128)


def test_begin_of_samples_is_no_token(data, tmp_path):
    """`<s>` before each sample."""
    words = ("--add-bos-token", "--max-target-positions", "17")
    path = small_models.train(data, tmp_path / "model", *words)
    assert len(token_nats(path, data, "test", MAX_TOKENS)) == len(text_of(data, "test"))
