"""`python -m data_prep`."""

import sys

# Worker processes import this file under another name, and do not need the rest.
if __name__ == "__main__":
    from .cli import main

    sys.exit(main())
