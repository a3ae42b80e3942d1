"""What a training, or an evaluation, leaves of itself in its process: nothing that another one would notice."""

import atexit
import logging
import sys
import warnings

import pytest
import recorded
from fairseq import checkpoint_utils
from fairseq.logging import metrics
from fairseq_cli import eval_lm
from fairseq_cli import train as fairseq_train
from plugin import ROUTERS, USER_DIR, train_arguments

from fairseq_hash.fairseq_patches.command_log import CommandLog
from fairseq_hash.training.trainer_state import TrainerState


def logging_and_warnings():
    """Return filters, level and switch of every logger that has one, and the filters of warnings."""
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    kept = {
        name: (list(logger.filters), logger.level, logger.disabled)
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger) and (logger.filters or logger.level or logger.disabled)
    }
    return kept, logging.root.manager.disable, list(warnings.filters)


def call(monkeypatch, main, words):
    monkeypatch.setattr(sys, "argv", ["fairseq", *map(str, words)])
    metrics.reset()
    main()


def test_two_trainings_and_an_evaluation(data, tmp_path, monkeypatch):
    """The first one imports libraries, which may have filters of warnings of their own."""
    states = [logging_and_warnings()]
    for run in ("first", "second"):
        given = train_arguments(data, tmp_path / run, *ROUTERS["hash"], "--max-update", "2", "--num-workers", "0")
        call(monkeypatch, fairseq_train.cli_main, given)
        states.append((*logging_and_warnings(), atexit._ncallbacks()))
    assert states[0][:2] == states[1][:2] and states[1] == states[2]
    words = (data, "--user-dir", USER_DIR, "--path", tmp_path / "first" / "checkpoint_last.pt", "--cpu")
    call(monkeypatch, eval_lm.cli_main, words)
    with pytest.raises(SystemExit):
        call(monkeypatch, eval_lm.cli_main, (*words, "--max-tokens", "8"))
    assert logging_and_warnings() == states[2][:3]


def test_each_trainer_has_a_state_of_its_own(data, tmp_path):
    trainer, iterator = recorded.make_trainer(data, ("--max-tokens", "64", "--save-dir", str(tmp_path / "a")))
    other, _ = recorded.make_trainer(data, ("--max-tokens", "64", "--save-dir", str(tmp_path / "b")))
    recorded.run(trainer, iterator, 2)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, iterator, 1.0)
    assert isinstance(trainer.hash_state, TrainerState) and trainer.hash_state.checkpoints.trainer is trainer
    assert (trainer.hash_state.saved_update, trainer.hash_state.real_batches) == (2, [])
    assert other.hash_state.saved_update is None and other.hash_state.shared is None


def test_a_commands_log_is_its_logger_but_for_what_is_corrected(caplog):
    logger = logging.getLogger("made_for_command_log")
    log = CommandLog(logger, {"a": "corrected", "b": None}.get)
    with caplog.at_level(logging.INFO):
        log.info("a")
        log.info("b")
        log.warning("a %s", "warning")
    assert caplog.messages == ["corrected", "a warning"]
    assert log.name == logger.name and log.filters is logger.filters
