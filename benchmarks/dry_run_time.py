#!/usr/bin/env python3
"""How long does an update take on this device, and how long does a dry run say it takes?

    OMP_NUM_THREADS=1 python benchmarks/dry_run_time.py [--updates 20] [--out FILE]
    python benchmarks/dry_run_time.py --device cuda --gpu h200

The CPU is measured first (`fairseq-hash plan --calibrate`); of a GPU the published figures are taken. Then each model
does real updates of random tokens with fairseq's trainer, and one dry. The result is a Markdown table: the median of
the real updates, and the estimate; on a GPU also the peak of torch's allocator during these updates, and the dry run's.
"""

import argparse
import gc
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from fairseq.trainer import Trainer

import fairseq_hash
from fairseq_hash.dry_run.calibrate import measure
from fairseq_hash.dry_run.hardware import Hardware, hardware
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
GPU_BATCH = ["dataset.max_tokens=16384", "optimization.update_freq=[1]", "criterion.update_freq_ranks=1"]
MODELS_ON_A_GPU = {
    "dense": ("reddit/dense", GPU_BATCH),
    "dense, wider FFNs": ("reddit/wider", GPU_BATCH),
    "hash, 64 experts": ("reddit/hash_1x64", GPU_BATCH),
    "switch, 64 experts": ("reddit/switch_1x64", GPU_BATCH),
}
WARM_UP = 3
HEADINGS = ["model", "real, ms", "estimate, ms", "estimate / real", "of it products", "memory", "calls"]
PEAKS = ["real peak, GB", "dry peak, GB", "dry / real"]


@dataclass(frozen=True)
class Real:
    """The median seconds of real updates, and on a GPU the bytes of the allocator's peak."""

    seconds: float
    peak: int


def real_updates(experiment: Experiment, updates: int, device: torch.device) -> Real:
    """Train for some updates in this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    config, vocabulary = experiment.config, experiment.about["vocabulary"]
    config.common.cpu = device.type == "cpu"
    task = made_task(config, vocabulary)
    trainer = Trainer(config, task, task.build_model(config.model), task.build_criterion(config.criterion))
    samples, times = batches_of(config).made(), []
    for sample in samples:
        for tokens in (sample["net_input"]["src_tokens"], sample["target"]):
            tokens.copy_(torch.randint(4, vocabulary, tokens.shape))
    with mock.patch("torch.cuda.reset_peak_memory_stats"):  # fairseq's trainer does it at the end of an update
        for _ in range(updates + WARM_UP):
            start = time.perf_counter()
            trainer.train_step(samples)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Real(statistics.median(times[WARM_UP:]), peak)


def rows(on: Hardware, updates: int, device: torch.device, names: "list[str] | None") -> list[list[str]]:
    """Return the rows of the table."""
    found = {}
    models = MODELS if device.type == "cpu" else MODELS_ON_A_GPU
    models = {name: models[name] for name in names or models}
    for model, (name, overrides) in models.items():
        with silence():
            found[model] = real_updates(compose(own_configs(), name, overrides), updates, device)
        gc.collect()  # the trainer and its tensors: the next peak is not to hold them
        print(f"{model}: {found[model]}", file=sys.stderr, flush=True)
    lines = []
    for model, real in found.items():
        name, overrides = models[model]
        dry = dry_run(compose(own_configs(), name, overrides), 1, 0, on)
        parts = seconds_of(dry, on)
        total = sum(parts.values())
        shares = [parts[key] / total for key in ("matrix products", "bytes of memory", "calls of operations")]
        line = [model, f"{real.seconds * 1e3:.1f}", f"{total * 1e3:.1f}", f"{total / real.seconds:.2f}"]
        line += [f"{one:.0%}" for one in shares]
        if real.peak:
            peak = sum(dry.peak.values())
            line += [f"{real.peak / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{peak / real.peak:.2f}"]
        lines.append(line)
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20, help="real updates of each model (default: 20)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--gpu", default="h200", help="figures, as plan --dry-run takes them (default: h200)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="of the table (default: all)")
    options = parser.parse_args()
    known = MODELS if options.device == "cpu" else MODELS_ON_A_GPU
    if unknown := set(options.models or ()) - set(known):
        parser.error(f"--models {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    fairseq_hash.register()
    torch.manual_seed(1)
    device = torch.device(options.device)
    on = measure() if device.type == "cpu" else hardware(options.gpu)
    headings = HEADINGS + (PEAKS if device.type == "cuda" else [])
    table = rows(on, options.updates, device, options.models)
    facts = {**provenance(), "threads": torch.get_num_threads(), "seed": 1, "updates": options.updates}
    if device.type == "cuda":
        facts |= {"card": torch.cuda.get_device_name(), "figures of": f"{on.name}: {on.source}"}
    facts |= {
        "10^12 FLOPs/s": on.flops,
        "10^9 bytes/s": f"{on.bandwidth:.3g}, {on.cached_bandwidth:.3g} in the cache",
        "call": f"{on.call:.3g} microseconds",
    }
    lines = ["# Time of a dry run", "", "`benchmarks/dry_run_time.py`, which says what is measured.", ""]
    lines += listed(facts)
    lines += [
        "",
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(row)} |" for row in table),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
