"""`python -m data_prep`."""

import sys

# Worker processes import this file under another name; they need none of what follows.
if __name__ == "__main__":
    import fairseq_hash

    fairseq_hash.register()  # before fairseq is imported, whose words it keeps back
    from data_prep.cli import main

    sys.exit(main())
