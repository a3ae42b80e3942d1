#!/usr/bin/env python3
"""How long does an update take on this CPU, and how long does a dry run say it takes?

    OMP_NUM_THREADS=1 python benchmarks/dry_run_time.py [--updates 20] [--out FILE]

The CPU is measured first (`fairseq-hash plan --calibrate`). Then each model does real updates of random tokens with
fairseq's trainer, and one dry. The result is a Markdown table: the median of the real updates, and the estimate.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from fairseq.trainer import Trainer

import fairseq_hash
from fairseq_hash.dry_run.calibrate import measure
from fairseq_hash.dry_run.hardware import Hardware
from fairseq_hash.dry_run.report import seconds_of
from fairseq_hash.dry_run.update import batches_of, dry_run, silence
from fairseq_hash.experiments.compose import Experiment, compose
from fairseq_hash.experiments.names import own_configs
from fairseq_hash.experiments.sizes import made_task
from fairseq_hash.provenance import listed, provenance

WIDER = ["model.decoder_embed_dim=256", "model.decoder_ffn_embed_dim=1024"]
WIDEST = ["model.decoder_embed_dim=512", "model.decoder_ffn_embed_dim=2048", "dataset.max_tokens=512"]
MODELS = {
    "dense": ("laptop/dense", []),
    "dense, wider FFNs": ("laptop/wider", []),
    "hash": ("laptop/hash", []),
    "switch": ("laptop/switch", []),
    "top-k by bias": ("laptop/topk_bias", []),
    "hash, D 256": ("laptop/hash", WIDER),
    "dense, D 512": ("laptop/dense", WIDEST),
}
WARM_UP = 3
HEADINGS = ("model", "real, ms", "estimate, ms", "estimate / real", "of it products", "memory", "calls")


def real_seconds(experiment: Experiment, updates: int) -> float:
    """Return the median time of an update in this process."""
    config, vocabulary = experiment.config, experiment.about["vocabulary"]
    config.common.cpu = True
    task = made_task(config, vocabulary)
    trainer = Trainer(config, task, task.build_model(config.model), task.build_criterion(config.criterion))
    samples, times = batches_of(config).made(), []
    for sample in samples:
        for tokens in (sample["net_input"]["src_tokens"], sample["target"]):
            tokens.copy_(torch.randint(4, vocabulary, tokens.shape))
    for _ in range(updates + WARM_UP):
        start = time.perf_counter()
        trainer.train_step(samples)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def rows(on: Hardware, updates: int) -> list[list[str]]:
    """Return the rows of the table."""
    lines = []
    for model, (name, overrides) in MODELS.items():
        experiment = compose(own_configs(), name, overrides)
        with silence():
            real = real_seconds(experiment, updates)
        parts = seconds_of(dry_run(experiment, 1, 0, on), on)
        total = sum(parts.values())
        shares = [parts[key] / total for key in ("matrix products", "bytes of memory", "calls of operations")]
        figures = [f"{real * 1e3:.1f}", f"{total * 1e3:.1f}", f"{total / real:.2f}", *(f"{one:.0%}" for one in shares)]
        lines.append([model, *figures])
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20, help="real updates of each model (default: 20)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    fairseq_hash.register()
    torch.manual_seed(1)
    on = measure()
    table = rows(on, options.updates)
    facts = {**provenance(), "threads": torch.get_num_threads(), "seed": 1, "updates": options.updates}
    facts |= {
        "10^12 FLOPs/s": on.flops,
        "10^9 bytes/s": f"{on.bandwidth:.3g}, {on.cached_bandwidth:.3g} in the cache",
        "call": f"{on.call:.3g} microseconds",
    }
    lines = ["# Time of a dry run", "", "`benchmarks/dry_run_time.py`, which says what is measured.", ""]
    lines += listed(facts)
    lines += [
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
        *(f"| {' | '.join(row)} |" for row in table),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
