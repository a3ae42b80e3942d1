"""`python -m data_prep`."""

import logging
import sys
import warnings

# Worker processes import this file under another name; they need none of what follows.
if __name__ == "__main__":
    # What fairseq and fairscale say of themselves when they are imported is not about the data.
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from data_prep.cli import main

    sys.exit(main())
