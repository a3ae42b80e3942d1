"""What a device can do: published figures of GPUs, or a file of measured ones."""

from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from fairseq_hash.core.errors import UserError
from fairseq_hash.core.yaml_text import check_yaml


@dataclass(frozen=True)
class Hardware:
    """A device and its wires, as a dry run reckons with them.

    Attributes:
        name: for people.
        source: where the figures are from.
        memory: bytes.
        flops: 10^12 a second of matrix products, by dtype (`bfloat16`, `float16`, `float32`), as they are reached.
        bandwidth: 10^9 bytes a second of memory, as they are reached.
        call: microseconds that an operation takes beside its work: on a CPU those of Python, on a GPU those of a
            kernel's start, where Python runs ahead.
        wire_inside: 10^9 bytes a second that a device sends to others of its node.
        wire_between: 10^9 bytes a second that a device sends to other nodes.
        latency: microseconds of one collective beside its bytes.
        cache: bytes that one operation may touch at `cached_bandwidth`; 0 where all comes from memory.
        cached_bandwidth: 10^9 bytes a second of what is in the cache.
        devices_per_node: devices of one node.
        is_gpu: whether experts are multiplied as on a GPU.
    """

    name: str
    source: str
    memory: float
    flops: dict[str, float]
    bandwidth: float
    call: float
    wire_inside: float
    wire_between: float
    latency: float
    cache: float = 0.0
    cached_bandwidth: float = 0.0
    devices_per_node: int = 8
    is_gpu: bool = True


REACHED = 0.6  # of the published rate of matrix products, by products of an expert's size
REACHED_BANDWIDTH = 0.8


def _published(
    name: str, gigabytes: float, tensor: float, single: float, bandwidth: float, nvlink: float, network: float
) -> Hardware:
    """Return a GPU by its published figures: FLOPs of dense products, TF32 left out, bytes a second one way."""
    flops = {"bfloat16": tensor * REACHED, "float16": tensor * REACHED, "float32": single * REACHED}
    source = f"published figures; {REACHED:.0%} of the products' rate, {REACHED_BANDWIDTH:.0%} of the bandwidths"
    share = REACHED_BANDWIDTH
    return Hardware(name, source, gigabytes * 1e9, flops, bandwidth * share, 5.0, nvlink * share, network * share, 20.0)


# NVIDIA's data sheets, SXM forms; the network is one InfiniBand port a GPU: 400 Gb/s (NDR), 200 Gb/s (HDR) for A100.
GPUS = {
    "h100": _published("H100 SXM 80 GB", 80, 989, 67, 3350, 450, 50),
    "h200": _published("H200 SXM 141 GB", 141, 989, 67, 4800, 450, 50),
    "a100": _published("A100 SXM 80 GB", 80, 312, 19.5, 2039, 300, 25),
}


def hardware(name: str) -> Hardware:
    """Return the hardware of a name, or of a YAML file with the fields of `Hardware`.

    Raises:
        UserError: with one line, if there is no such name or file, or a field is missing, unknown or out of range.
    """
    if name in GPUS:
        return GPUS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UserError(f"--gpu {name} is neither {', '.join(GPUS)} nor a YAML file that is there")
    check_yaml(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--gpu {name} cannot be read: {' '.join(str(error).split())}") from None
    return _of_fields(given, name)


def _of_fields(given: Any, name: str) -> Hardware:
    known = {f.name: f for f in fields(Hardware)}
    if not isinstance(given, dict) or (unknown := sorted(map(str, set(given) - set(known)))):
        what = f"has no entry {unknown[0]}" if isinstance(given, dict) else "is no list of names and values"
        raise UserError(f"--gpu {name}: it {what}; give {', '.join(known)}")
    needed = [key for key, of in known.items() if of.default is MISSING and key not in given]
    if needed:
        raise UserError(f"--gpu {name} lacks {needed[0]}; plan --calibrate writes such a file for a CPU")
    numbers = {key: given[key] for key in given if key not in ("name", "source", "flops", "is_gpu")}
    flops = given["flops"]
    if not isinstance(flops, dict) or "float32" not in flops:
        raise UserError(f"--gpu {name}: flops needs the rate of float32, and of bfloat16 and float16 where used")
    for key, value in {**numbers, **{f"flops.{dtype}": rate for dtype, rate in flops.items()}}.items():
        least = 0 if "cache" in key else 1e-12
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
            raise UserError(
                f"--gpu {name}: {key} is {value}; give a number {'of 0 or more' if not least else 'above 0'}"
            )
    if given.get("cache", 0) and not given.get("cached_bandwidth", 0):
        raise UserError(f"--gpu {name} has a cache and no cached_bandwidth; give both, or neither")
    return Hardware(**given)


def as_yaml(of: Hardware) -> str:
    """Return a file's text for hardware."""
    return yaml.safe_dump(asdict(of), sort_keys=False)
