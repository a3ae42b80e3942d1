#!/usr/bin/env python3
"""One update of each router in `torch.profiler`: which kernels take the time, and how long the device is idle.

    python benchmarks/profile_step.py [the options of train.py] [--traces DIR] [--out FILE] [--json FILE]

Models, trainer and batches are those of `train.py`. After a few updates, one is profiled. `busy` is the time in which
at least one kernel runs on the device, `idle` the rest of the update. On a CPU the operators' own time replaces the
kernels'. The profiler slows the host: idle is an upper bound. `waits` counts how often the host waited for the device.
A trace (Chrome's format) of each router goes to --traces.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import train
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fairseq_hash.provenance import provenance

WARM_UP = 3
TOP = 12
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def union(spans: "list[tuple[float, float]]") -> float:
    """Return the total length covered by the spans (start, end)."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def profile_update(trainer: Any, batches: "list[Any]", on_cuda: bool, trace: "Path | None") -> dict[str, Any]:
    """Return the figures of one update; times in milliseconds."""
    for batch in batches[:-1]:
        train.update(trainer, batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        wall = train.update(trainer, batches[-1])
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    # fairseq names its phases; the span of a name is from its first kernel to its last.
    events = [event for event in profiler.events() if event.device_type == kind and not event.is_user_annotation]
    total: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for event in events:
        total[event.name] += event.time_range.elapsed_us() / 1000 if on_cuda else event.self_cpu_time_total / 1000
        calls[event.name] += 1
    busy = union([(event.time_range.start, event.time_range.end) for event in events]) / 1000 if on_cuda else None
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    top = sorted(total, key=total.get, reverse=True)[:TOP]
    return {
        "wall_ms": 1000 * wall,
        "busy_ms": busy,
        "idle": None if busy is None else max(0.0, 1 - busy / (1000 * wall)),
        "kernels": sum(calls.values()),
        "waits": sum(event.name.startswith(WAITS) for event in profiler.events()),
        "top": [{"name": name, "ms": total[name], "calls": calls[name]} for name in top],
    }


def markdown(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each router, then the kernels of each."""
    lines = ["| router | update ms | busy ms | idle | kernels | waits |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in rows.items():
        busy, idle = ("–", "–") if row["idle"] is None else (f"{row['busy_ms']:.1f}", f"{row['idle']:.0%}")
        lines.append(f"| {name} | {row['wall_ms']:.1f} | {busy} | {idle} | {row['kernels']} | {row['waits']} |")
    for name, row in rows.items():
        lines += ["", f"{name}:", "", "| ms | calls | kernel |", "|---:|---:|---|"]
        lines += [f"| {one['ms']:.2f} | {one['calls']} | `{one['name'][:110]}` |" for one in row["top"]]
    return lines


def write(arguments: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """Write the requested files."""
    settings, facts = train.settings_of(arguments), provenance()
    if arguments.json:
        content = {"benchmark": "profile", "provenance": facts, "settings": settings, "rows": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.out:
        head = ["# One update profiled", "", "`python benchmarks/profile_step.py`, which defines the columns", ""]
        head += [f"- {key}: {value}" for key, value in {**settings, **facts}.items() if value]
        arguments.out.write_text("\n".join([*head, "", *markdown(rows)]) + "\n")


def main() -> None:
    """Profile each candidate, one after the other."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--traces", type=Path)
    mine, rest = own.parse_known_args()
    sys.argv[1:] = rest
    arguments = train.parse()
    if set(arguments.candidates) - set(train.ROUTERS):
        sys.exit("profile_step: plain and compiled are not profiled; leave them out of --candidates")
    if mine.traces is not None and not mine.traces.is_dir():
        sys.exit(f"profile_step: --traces {mine.traces} is no folder; make it first")
    torch.set_num_threads(arguments.threads)
    train.silence()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        data = train.data_of(arguments, Path(folder))
        for name in arguments.candidates:
            trainer = train.build(train.trainer_options(arguments, arguments.experts[0], data, name))
            batches = train.batches_of(trainer, WARM_UP + 1)
            trace = None if mine.traces is None else mine.traces / f"{name}.json.gz"
            rows[name] = profile_update(trainer, batches, arguments.device == "cuda", trace)
            del trainer
            write(arguments, rows)  # the results so far
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
