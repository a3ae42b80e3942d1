"""Other commands of fairseq-hash, which a study calls in a process of their own."""

import subprocess
import sys
from collections.abc import Sequence

from fairseq_hash.core.errors import UserError

MAIN = "import sys; from fairseq_hash.cli import main; sys.exit(main())"


def run_command(words: Sequence[str], failed: str) -> None:
    """Run `fairseq-hash WORDS...`. Raise `UserError`, with `failed` and the command's own line, if it fails."""
    done = subprocess.run([sys.executable, "-c", MAIN, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        line = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UserError(f"{failed}: {line.removeprefix('fairseq-hash: ')}")
