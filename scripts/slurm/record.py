"""Print what one start of a job is, as JSON: python scripts/slurm/record.py RANKS ARGUMENTS..."""

import json
import os
import sys

from fairseq_hash.provenance import provenance


def main(ranks: str, *arguments: str) -> None:
    """Print the record of the start of a training with `arguments` on so many ranks."""
    slurm = {
        name.lower(): os.environ.get(f"SLURM_{name}")
        for name in ("JOB_ID", "RESTART_COUNT", "JOB_NODELIST", "JOB_NUM_NODES", "GPUS_ON_NODE", "JOB_PARTITION")
    }
    command = ["python", "-m", "fairseq_cli.hydra_train", *arguments]
    print(json.dumps({"command": command, "ranks": int(ranks), **slurm, **provenance()}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
