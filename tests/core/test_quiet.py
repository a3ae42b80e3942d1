"""Work without what libraries say of it, and loggers as they were afterwards."""

import logging

import pytest

from fairseq_hash.core.quiet import only_warnings


def test_warnings_alone_are_said_and_levels_come_back(caplog):
    caplog.set_level(logging.INFO)
    package, part = logging.getLogger("made_for_quiet"), logging.getLogger("made_for_quiet.part")
    other = logging.getLogger("made_for_quiet_too")
    with pytest.raises(ZeroDivisionError), only_warnings("made_for_quiet"):
        part.info("not said")
        part.warning("said")
        other.info("of another package")
        1 / 0  # noqa: B018
    part.info("said again")
    assert caplog.messages == ["said", "of another package", "said again"]
    assert package.level == part.level == logging.NOTSET


def test_a_logger_that_says_less_stays_so(caplog):
    logger = logging.getLogger("made_for_quiet.errors")
    logger.setLevel(logging.ERROR)
    with only_warnings("made_for_quiet.errors"):
        logger.warning("not said")
    assert logger.level == logging.ERROR and not caplog.messages
