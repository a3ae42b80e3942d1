"""`python -m data_prep`."""

import sys

# Worker processes import this file under another name; they need none of what follows.
if __name__ == "__main__":
    import fairseq_hash  # noqa: F401  (before fairseq, whose import it keeps quiet)
    from data_prep.cli import main

    sys.exit(main())
