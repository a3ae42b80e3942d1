"""What fairseq says of an evaluation."""

import logging

ORACLE = "Perplexity of an oracle, which sees the next token:"


def name_oracle() -> None:
    """Let `fairseq-eval-lm` say of its result that it is an oracle's.

    Upstream: `main` in fairseq_cli/eval_lm.py logs "Perplexity: ..." for any model, and asks no model or criterion.
    """
    logger = logging.getLogger("fairseq_cli.eval_lm")
    if not any(isinstance(known, _NameOracle) for known in logger.filters):
        logger.addFilter(_NameOracle())


class _NameOracle(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str):
            record.msg = record.msg.replace("Perplexity:", ORACLE)
        return True
