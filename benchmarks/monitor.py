#!/usr/bin/env python3
"""What does the monitor of the experts (`--monitor-interval`) cost of an update?

    OMP_NUM_THREADS=1 python benchmarks/monitor.py [--rounds 40] [--ranks 2] [--interval 100] [--out FILE]

Each model does rounds of three updates of random tokens with fairseq's trainer, one after the other and in the opposite
order every other round: without the monitor, with it between two measurements, and with a measurement. A ratio is of
two updates of one round, of the processor's time in this process (rank 0), which a busy machine disturbs less than the
time that passes. The share at an interval is what both kinds of updates cost together, from these ratios and, with less
noise, from the time of the monitor's own calls.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fairseq.logging import metrics
from fairseq.trainer import Trainer

import fairseq_hash
from fairseq_hash.dry_run.update import batches_of, silence
from fairseq_hash.experiments.compose import compose
from fairseq_hash.experiments.names import own_configs
from fairseq_hash.experiments.sizes import made_task
from fairseq_hash.provenance import listed, provenance
from fairseq_hash.training.expert_monitor import ExpertMonitor

WIDER = ["model.decoder_embed_dim=256", "model.decoder_ffn_embed_dim=1024"]
MANY = ["model.num_experts=64"]
MODELS = {
    "hash": ("laptop/hash", []),
    "switch": ("laptop/switch", []),
    "switch, 64 experts": ("laptop/switch", MANY),
    "hash, D 256": ("laptop/hash", WIDER),
}
WARM_UP = 3
WITHOUT, BETWEEN, MEASURED = "without", "between", "measured"
NEVER = 10**12
HEADINGS = (
    "ranks",
    "model",
    "update, ms of the processor",
    "between / without",
    "measured / without",
    "share at {} by ratios",
)
HEADINGS += ("own, between, ms", "own, measured, ms", "share at {} by own time")


class OwnTime:
    """Adds up the seconds of the monitor's calls."""

    def __init__(self, monitor: ExpertMonitor) -> None:
        self.seconds = 0.0
        for name in ("begin", "see_gradients", "end"):
            setattr(monitor, name, self._timed(getattr(monitor, name)))

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any) -> Any:
            start = time.process_time()
            result = call(*args)
            self.seconds += time.process_time() - start
            return result

        return timed


def make_trainer(name: str, words: list[str], ranks: int, rank: int, folder: str) -> "tuple[Trainer, Any]":
    """Return a trainer of a configuration, and the batches of an update."""
    metrics.reset()
    config, vocabulary = (experiment := compose(own_configs(), name, words)).config, experiment.about["vocabulary"]
    config.common.cpu = True
    config.checkpoint.save_dir = folder
    config.distributed_training.distributed_world_size = ranks
    config.distributed_training.distributed_rank = rank
    config.distributed_training.ddp_backend = "legacy_ddp"
    task = made_task(config, vocabulary)
    trainer = Trainer(config, task, task.build_model(config.model), task.build_criterion(config.criterion))
    samples = batches_of(config).made()
    generator = torch.Generator().manual_seed(rank)
    for sample in samples:
        for tokens in (sample["net_input"]["src_tokens"], sample["target"]):
            tokens.copy_(torch.randint(4, vocabulary, tokens.shape, generator=generator))
    return trainer, samples


def measure(name: str, words: list[str], rounds: int, ranks: int, rank: int, folder: str) -> dict[str, list[float]]:
    """Return the seconds of the updates of each kind, and those of the monitor's own calls, by round."""
    trainer, samples = make_trainer(
        name, [*words, "+criterion.monitor_interval=1", "criterion.update_freq_ranks=0"], ranks, rank, folder
    )
    monitor = trainer.hash_state.monitor
    own = OwnTime(monitor)
    found: dict[str, list[float]] = {kind: [] for kind in (WITHOUT, BETWEEN, MEASURED, "own between", "own measured")}
    for number in range(rounds + WARM_UP):
        kinds = [WITHOUT, BETWEEN, MEASURED]
        for kind in kinds if number % 2 else reversed(kinds):
            trainer.hash_state.monitor = None if kind == WITHOUT else monitor
            monitor.interval = 1 if kind == MEASURED else NEVER
            own.seconds = 0.0
            if ranks > 1:
                dist.barrier()
            start = time.process_time()
            trainer.train_step(samples)
            seconds = time.process_time() - start
            if number >= WARM_UP:
                found[kind].append(seconds)
                if kind != WITHOUT:
                    found[f"own {kind}"].append(own.seconds)
    return found


def row(model: str, found: dict[str, list[float]], ranks: int, interval: int) -> list[str]:
    """Return a line of the table."""
    without = np.array(found[WITHOUT])
    between, measured = (np.array(found[kind]) / without for kind in (BETWEEN, MEASURED))
    by_ratio = ((np.median(between) - 1) * (interval - 1) + np.median(measured) - 1) / interval
    own = {kind: statistics.median(found[f"own {kind}"]) for kind in (BETWEEN, MEASURED)}
    share = (own[BETWEEN] * (interval - 1) + own[MEASURED]) / interval / float(np.median(without))
    cells = [str(ranks), model, f"{1e3 * np.median(without):.1f}", quartiles(between), quartiles(measured)]
    return [
        *cells,
        f"{by_ratio:.2%}",
        f"{1e3 * own[BETWEEN]:.3f}",
        f"{1e3 * own[MEASURED]:.2f}",
        f"{share:.3%}",
    ]


def quartiles(ratios: np.ndarray) -> str:
    """Return median and quartiles."""
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def be_rank(rank: int, ranks: int, rounds: int, folder: str) -> None:
    """Measure all models as one of several ranks; rank 0 keeps what it found."""
    start_process()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=ranks, rank=rank)
    found = {model: measure(name, words, rounds, ranks, rank, folder) for model, (name, words) in MODELS.items()}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()


def start_process() -> None:
    """Prepare a process that measures."""
    torch.set_num_threads(1)
    fairseq_hash.register()
    silence()
    logging.disable(logging.WARNING)  # random tokens make dead experts, which the monitor warns of


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="rounds of three updates of each model (default 40)")
    parser.add_argument("--ranks", type=int, default=2, help="also as so many ranks that share experts (default 2)")
    parser.add_argument("--interval", type=int, default=100, help="of measurements, for the share (default 100)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the Markdown here (default: print it)")
    arguments = parser.parse_args()
    start_process()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for model, (name, words) in MODELS.items():
            lines.append(row(model, measure(name, words, arguments.rounds, 1, 0, folder), 1, arguments.interval))
            print(*lines[-1], sep="  ", flush=True)
        if arguments.ranks > 1:
            torch.multiprocessing.spawn(be_rank, (arguments.ranks, arguments.rounds, folder), arguments.ranks)
            found = torch.load(f"{folder}/found.pt")
            lines += [row(model, of_model, arguments.ranks, arguments.interval) for model, of_model in found.items()]
    about = {**provenance(), "threads": 1, "rounds": arguments.rounds, "load average": os.getloadavg()}
    text = "# Cost of the monitor\n\n`benchmarks/monitor.py`, which says what is measured.\n\n"
    text += "\n".join(listed(about)) + "\n\n"
    headings = [heading.format(arguments.interval) for heading in HEADINGS]
    text += "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *lines)) + "\n"
    if arguments.out is None:
        print(text)
    else:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
