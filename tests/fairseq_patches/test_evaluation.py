"""`fairseq-eval-lm` and validation: all of the text as it was cut in training, or one line and no perplexity.

The commands' main functions run in this process; what they score is compared with the words and lines of the text.
"""

import logging
import re
import sys

import pytest
import small_models
from fairseq.logging import metrics
from fairseq.models.fairseq_model import BaseFairseqModel
from fairseq_cli import eval_lm, validate
from fairseq_cli import train as fairseq_train
from plugin import USER_DIR, build, train, train_arguments

HASH = ("--router", "hash", "--num-experts", "4", "--sparse-layers", "1", "--max-update", "4")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Checkpoints of a model of blocks of 16 tokens, of one of sentences, and of one with `<s>`, by name."""
    folder = tmp_path_factory.mktemp("trained")
    sentences = ("--sample-break-mode", "eos", "--max-target-positions", "32", "--tokens-per-sample", "32")
    kinds = {"blocks": (), "sentences": sentences, "bos": ("--add-bos-token", "--max-target-positions", "17")}
    for name, options in kinds.items():
        train(data, folder / name, *HASH, *options)
    return {name: folder / name / "checkpoint_last.pt" for name in kinds}


@pytest.fixture
def evaluate(data, monkeypatch, caplog):
    """Return a function of a checkpoint and options: what `fairseq-eval-lm` on test says, or the line it ends with."""

    def call(path, *options, main=eval_lm.cli_main):
        fixed = ["fairseq", data, "--user-dir", USER_DIR, "--path", path, "--cpu", "--num-workers", "0"]
        fixed += ["--gen-subset", "test"] if main is eval_lm.cli_main else []
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*fixed, *options)])
        caplog.clear()
        metrics.reset()  # fairseq-validate adds to what the process has logged before, of models of other sizes
        with caplog.at_level(logging.INFO):
            main()
        return "\n".join(caplog.messages)

    def refused(*arguments, **kwargs):
        with pytest.raises(SystemExit) as end:
            call(*arguments, **kwargs)
        assert re.fullmatch("fairseq_hash: .+", end.value.code) and "Perplexity: " not in "\n".join(caplog.messages)
        return end.value.code

    call.refused = refused
    return call


def result(said):
    """Return the number of tokens and the perplexity that an evaluation logged."""
    tokens, perplexity = re.search(r"Evaluated ([\d,]+) tokens[\s\S]*Perplexity: (\S+)", said).groups()
    return int(tokens.replace(",", "")), float(perplexity)


def tokens_of(data, subset):
    """Return how many tokens a text has: its words and the ends of its lines."""
    text = (data.parent / f"{subset}.txt").read_text()
    return len(text.split()) + text.count("\n")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("blocks", ("--tokens-per-sample", "16")),
        ("sentences", ("--tokens-per-sample", "32", "--sample-break-mode", "eos")),
        ("bos", ("--tokens-per-sample", "16", "--add-bos-token")),
    ],
)
def test_text_is_cut_as_in_training(data, trained, evaluate, name, options):
    """Without options it is what the options of the training give, on every token of the text; others are heeded."""
    said = evaluate(trained[name])
    given = evaluate(trained[name], *options)
    assert result(said) == result(given) and "as in training: --tokens-per-sample" in said
    extra = 0 if name != "bos" else len(re.findall(r"\S+", "x " * -(-tokens_of(data, "test") // 16)))
    assert result(said)[0] == tokens_of(data, "test") + extra  # fairseq counts <s> of every block
    other = evaluate(trained[name], "--tokens-per-sample", "8", "--sample-break-mode", "none")
    assert "--tokens-per-sample" not in other.partition("as in training: ")[2].partition("\n")[0]
    assert result(other)[1] != result(said)[1]


@pytest.mark.parametrize("window", [4, 15])
def test_a_context_window_and_batches_of_the_softmax(data, trained, evaluate, window):
    """Every token is scored once, in samples that the model has positions for."""
    said = evaluate(trained["blocks"], "--context-window", window, "--max-tokens", "64")
    scored = int(re.search(r"Evaluated ([\d,]+)", said)[1].replace(",", ""))
    assert scored == tokens_of(data, "test")
    batched = evaluate(trained["blocks"], "--context-window", window, "--max-tokens", "64", "--softmax-batch", "32")
    assert result(batched) == result(said)


def test_an_oracle_is_named_in_its_own_result_alone(data, trained, evaluate, tmp_path):
    """Other models that this process evaluates before and after it have a perplexity."""
    before = result(evaluate(trained["blocks"]))
    train(data, tmp_path, *HASH, "--hash-feature", "future", "--disable-validation")
    for _ in range(2):
        said = evaluate(tmp_path / "checkpoint_last.pt")
        assert "Perplexity of an oracle, which sees the next token: " in said and "Perplexity: " not in said
    assert result(evaluate(trained["blocks"])) == before


def test_base_is_an_oracle_if_it_is_evaluated_balanced(data, evaluate):
    """The same checkpoint has a perplexity if it is evaluated as published."""
    path = small_models.checkpoint(data, "base")
    assert "Perplexity: " in evaluate(path)
    said = evaluate(path, "--model-overrides", "{'base_evaluation': 'balanced'}")
    assert "Perplexity of an oracle, which sees the next token: " in said and "Perplexity: " not in said


def test_a_part_of_the_text_is_no_result(trained, evaluate):
    blocks = trained["blocks"]
    assert re.fullmatch(
        r"fairseq_hash: (\d) of \1 samples of test, with (\d+) of \2 tokens, are longer than 16 tokens \(the positions "
        r"of the model\); cut them by --tokens-per-sample 16 or less",
        evaluate.refused(blocks, "--tokens-per-sample", "200"),
    )
    line = r"longer than 12 tokens \(.* model, less --context-window\); cut them by --tokens-per-sample 16 or less$"
    assert re.search(line, evaluate.refused(blocks, "--tokens-per-sample", "20", "--context-window", "4"))
    assert re.search(
        r"(\d+) of \d+ samples of test, with \d+ of \d+ tokens, .*; cut them by --sample-break-mode none "
        "--tokens-per-sample 16$",
        evaluate.refused(blocks, "--sample-break-mode", "complete", "--tokens-per-sample", "20"),
    )
    line = "longer than 8 tokens (--max-tokens); cut them by --tokens-per-sample 8 or less, or give --max-tokens 16 "
    assert line in evaluate.refused(blocks, "--max-tokens", "8")
    assert "evaluate in one process, without --num-shards" in evaluate.refused(blocks, "--num-shards", "2")
    line = "--context-window 16 leaves no token to score of --tokens-per-sample 16"
    assert line in evaluate.refused(blocks, "--context-window", "16")


@pytest.mark.parametrize("value", ["-inf", "nan"])
def test_a_token_without_probability_is_no_result(trained, evaluate, monkeypatch, value):
    """fairseq leaves out an infinite score, and prints nan as a perplexity."""
    original = BaseFairseqModel.get_normalized_probs

    def spoiled(*args, **kwargs):
        probabilities = original(*args, **kwargs)
        probabilities[..., 4] = float(value)  # the most frequent word
        return probabilities

    monkeypatch.setattr(BaseFairseqModel, "get_normalized_probs", spoiled)
    assert "the model gives a token no probability" in evaluate.refused(trained["blocks"])


def test_validate_is_an_evaluation_too(trained, evaluate):
    """`fairseq-validate` takes the text from the checkpoint's options; it stops, or says what it leaves out."""
    command = {"main": validate.cli_main}
    options = ("--task", "language_modeling", "--valid-subset", "test", "--max-tokens", "256")
    evaluate(trained["sentences"], *options, **command)
    short = (*options, "--max-target-positions", "8", "--tokens-per-sample", "8")
    line = r"longer than 8 tokens .*leave them out by --skip-invalid-size-inputs-valid-test$"
    assert re.search(line, evaluate.refused(trained["sentences"], *short, **command))


def test_a_training_refuses_its_validation_before_it_starts(data, tmp_path, monkeypatch, caplog):
    """A text that the first validation would stop at, or text of which training would leave out all full blocks."""

    def refused(*options):
        arguments = train_arguments(data, tmp_path / "none", *HASH, *options)
        monkeypatch.setattr(sys, "argv", ["fairseq", *map(str, arguments)])
        monkeypatch.setattr("fairseq.trainer.Trainer.train_step", lambda *_, **__: pytest.fail("it trains"))
        with pytest.raises(SystemExit) as end:
            fairseq_train.cli_main()
        return end.value.code

    assert re.search(
        r"samples of valid, .* longer than 8 tokens \(the positions of the model\); cut them by --tokens-per-sample 8 "
        "or less, or give the model --max-target-positions 16$",
        refused("--max-target-positions", "8"),
    )
    assert re.search(r"samples of train, .*\(--max", refused("--max-tokens", "8", "--disable-validation"))
    sentences = ("--sample-break-mode", "eos", "--tokens-per-sample", "8")
    assert re.search(
        r"^fairseq_hash: \d+ of 60 samples of valid, with \d+ of \d+ tokens, are longer than 8 tokens .*; cut them by "
        "--sample-break-mode none --tokens-per-sample 8, or give the model --max-target-positions \\d+, or leave them "
        "out by --skip-invalid-size-inputs-valid-test$",
        refused(*sentences),
    )


def test_what_training_leaves_out_is_named(data, caplog):
    """As asked for, with the share of the text; by the sizes of the sentences."""
    options = ("--sample-break-mode", "eos", "--tokens-per-sample", "8")
    _, task, model, _ = build(data, *HASH, *options)
    task.load_dataset("valid")
    sizes = [len(line.split()) + 1 for line in (data.parent / "valid.txt").read_text().splitlines()]
    long = [size for size in sizes if size > 8]
    with caplog.at_level(logging.WARNING):
        limits = {"max_tokens": 64, "max_positions": model.max_positions(), "ignore_invalid_inputs": True}
        iterator = task.get_batch_iterator(task.dataset("valid"), **limits)
    assert sum(batch["ntokens"] for batch in iterator.next_epoch_itr(shuffle=False)) == sum(sizes) - sum(long)
    shares = f"{len(long)} of 60 samples of valid, with {sum(long)} of {sum(sizes)} tokens"
    assert f"{shares}, are longer than 8 tokens (the positions of the model) and left out" in caplog.messages
