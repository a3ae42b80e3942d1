"""The file formats that readers take, as trees whose values can be mutated and written again."""

import io
import json
import pickle
import struct
import zipfile
from typing import Any

import torch
import yaml
from fuzz_mutations import DEPTH, NESTED, Tree

INDEX = struct.Struct("<9sQBQ")  # of fairseq's binarized data: magic, version, code of the type, number of lines
ODD_TENSORS = (
    torch.zeros(0),
    torch.zeros(()),
    torch.zeros(2, 3),
    torch.full((4,), float("nan")),
    torch.zeros(3, dtype=torch.int64),
    torch.full((2, 1), -(2**63)),
    torch.zeros(1, dtype=torch.float32).expand(2**40),  # a terabyte in 4 bytes
    torch.zeros(2, dtype=torch.complex64),
    torch.zeros(2, dtype=torch.bfloat16),
)


def _nested(text: str, opening: str = "[", closing: str = "]") -> bytes:
    """Write deep brackets where the mark stands: writers give up long before readers do."""
    text = text.replace(f'"{NESTED}"', NESTED).replace(f"'{NESTED}'", NESTED)
    return text.replace(NESTED, opening * DEPTH + closing * DEPTH).encode("utf-8", "surrogatepass")


def json_bytes(value: Any) -> bytes:
    """Return JSON."""
    return _nested(json.dumps(value))


def json_tree(value: Any) -> Tree:
    """Return a JSON file."""
    return Tree(value, json_bytes)


def yaml_tree(text: str) -> Tree:
    """Return a YAML file; its comments are gone, but a first one is for Hydra and stays."""
    first = text.splitlines()[0] + "\n" if text.startswith("# @") else ""

    def dump(value: Any) -> bytes:
        return _nested(first + yaml.safe_dump(value, sort_keys=False))

    return Tree(yaml.safe_load(text), dump)


def log_tree(text: str) -> Tree:
    """Return a log whose lines end in JSON, or in what fairseq prints of a configuration, or in words."""
    lines = []
    for line in text.splitlines():
        before, brace, rest = line.partition("{")
        try:
            lines.append([before, json.loads(brace + rest)])
        except ValueError:
            lines.append([line])

    def dump(value: list) -> bytes:
        parts = ([one if isinstance(one, str) else json.dumps(one) for one in line] for line in value)
        return _nested("\n".join("".join(line) for line in parts) + "\n")

    return Tree(lines, dump)


def zip_tree(content: bytes) -> Tree:
    """Return an archive whose members are mutated, so that the checksums are right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def dump(value: dict) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, member in value.items():
                archive.writestr(name, member)
        return buffer.getvalue()

    return Tree(members, dump)


def safetensors_tree(content: bytes) -> Tree:
    """Return a safetensors file, JSON in its metadata as values."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, text in header.get("__metadata__", {}).items():
        if text.startswith(("{", "[")):
            header["__metadata__"][name] = json.loads(text)

    def dump(value: dict) -> bytes:
        header = dict(value["header"])
        if isinstance(header.get("__metadata__"), dict):
            texts = header["__metadata__"].items()
            header["__metadata__"] = {
                name: text if isinstance(text, str) else json_bytes(text).decode() for name, text in texts
            }
        text = json_bytes(header)
        return len(text).to_bytes(8, "little") + text + value["data"]

    return Tree({"header": header, "data": content[8 + size :]}, dump)


def npy_tree(descr: str, shape: tuple, data: bytes) -> Tree:
    """Return a .npy file, of version 1."""

    def dump(value: dict) -> bytes:
        header = repr({key: value[key] for key in ("descr", "fortran_order", "shape") if key in value}).encode()
        header += b" " * (-(11 + len(header)) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + value["data"]

    return Tree({"descr": descr, "fortran_order": False, "shape": shape, "data": data}, dump)


def index_tree(content: bytes) -> Tree:
    """Return the index of binarized data."""
    magic, version, code, lines = INDEX.unpack_from(content)
    sizes = list(struct.unpack_from(f"<{lines}i", content, INDEX.size))

    def dump(value: dict) -> bytes:
        head = INDEX.pack(*(value[key] for key in ("magic", "version", "code", "lines")))
        return head + struct.pack(f"<{len(value['sizes'])}i", *value["sizes"]) + value["places"]

    places = content[INDEX.size + 4 * lines :]
    return Tree(
        {"magic": magic, "version": version, "code": code, "lines": lines, "sizes": sizes, "places": places}, dump
    )


def torch_tree(state: Any) -> Tree:
    """Return a file of `torch.save`."""
    return Tree(state, torch_bytes, ODD_TENSORS)


def torch_bytes(state: Any, **how: Any) -> bytes:
    """Return what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer, **how)
    return buffer.getvalue()


class Command:
    """Pickles as a call of a command: who unpickles it without care runs it."""

    def __reduce__(self) -> tuple:
        import os

        return os.system, ("true",)


def pickle_with_command(protocol: int = 2) -> bytes:
    """Return a pickle that runs a command."""
    return pickle.dumps({"model": {}, "x": Command()}, protocol)
