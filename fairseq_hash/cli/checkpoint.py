"""`fairseq-hash checkpoint`: show, check, merge, split and average checkpoints, and extract their hash table."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fairseq_hash.cli.arguments import add_out, add_verb
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import check_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `checkpoint`, and add its own verbs."""
    parser.description = "Show and check checkpoints, and make others from them."
    verbs = parser.add_subparsers(dest="checkpoint_verb", required=True, metavar="VERB")

    add = add_verb(verbs, "show", run_show, "show the contents of a checkpoint without reading its experts")
    add("checkpoint", type=Path, metavar="CKPT", help="main file, such as checkpoint_best.pt")
    add("--json", action="store_true", help="print the facts as one JSON object")

    add = add_verb(verbs, "verify", run_verify, "compare every byte of checkpoints with its checksums")
    add("checkpoints", nargs="+", type=Path, metavar="CKPT", help="main files")

    add = add_verb(verbs, "merge", run_merge, "write one plain fairseq file with all experts")
    add("checkpoint", type=Path, metavar="CKPT", help="main file")
    add("--no-optimizer", action="store_true", help="leave the optimizer's state out")
    ema = "take the running average of --store-ema as the weights, without optimizer state"
    add("--ema", action="store_true", help=ema)
    add_out(add, "checkpoint to write", "FILE, not its shards")

    add = add_verb(verbs, "split", run_split, "write a checkpoint whose experts are in shards")
    add("checkpoint", type=Path, metavar="CKPT", help="main file, or a plain file that merge wrote")
    shards = "number of shards, 1 to the number of experts (default: 1)"
    add("--shards", type=int, default=1, metavar="N", help=shards)
    add_out(add, "main file to write, .pt; its shards go to experts/ beside it", "FILE, not its shards")

    add = add_verb(
        verbs,
        "average",
        run_average,
        "write the mean of the weights of checkpoints of one model",
        "Write the mean of the weights of checkpoints of one model. Everything else comes from the last checkpoint, "
        "except the optimizer's state, which is left out. The result is in shards if the last checkpoint is.",
    )
    add("checkpoints", nargs="+", type=Path, metavar="CKPT", help="main files, two or more")
    add_out(add, "checkpoint to write, .pt", "FILE, not its shards")

    add = add_verb(verbs, "table", run_table, "write a checkpoint's hash table to a file for --hash-table")
    add("checkpoint", type=Path, metavar="CKPT", help="main file")
    number = "number of the table, from 0, if each hash layer has a table of its own"
    add("--number", type=int, metavar="N", help=number)
    add_out(add, "table file to write (safetensors)", "FILE, not its shards")


def _check_main_name(out: Path) -> None:
    """Raise `UserError` for a name that trainings ignore when they remove unused shards."""
    if out.suffix != ".pt":
        raise UserError(f"--out {out} does not end in .pt, as the main file of shards must; give such a name")


def run_merge(arguments: argparse.Namespace) -> None:
    """Merge, and say what was written."""
    from fairseq_hash.checkpoint.convert import merge

    check_out(arguments.out, arguments.overwrite)
    merge(arguments.checkpoint, arguments.out, not arguments.no_optimizer, is_average=arguments.ema)
    print(f"wrote {arguments.out}")


def run_split(arguments: argparse.Namespace) -> None:
    """Split, and say what was written."""
    from fairseq_hash.checkpoint.convert import split

    check_out(arguments.out, arguments.overwrite)
    _check_main_name(arguments.out)
    split(arguments.checkpoint, arguments.out, arguments.shards)
    print(f"wrote {arguments.out}")


def run_average(arguments: argparse.Namespace) -> None:
    """Average, and say what was written."""
    from fairseq_hash.checkpoint.convert import average

    check_out(arguments.out, arguments.overwrite)
    _check_main_name(arguments.out)
    if len(arguments.checkpoints) < 2:
        raise UserError(f"{arguments.checkpoints[0]} alone has no average; give two or more checkpoints")
    average(arguments.checkpoints, arguments.out)
    print(f"wrote {arguments.out}")


def run_table(arguments: argparse.Namespace) -> None:
    """Write the hash table of a checkpoint to a file."""
    from fairseq_hash.checkpoint.hash_tables import tables_of
    from fairseq_hash.checkpoint.inspection import model_options
    from fairseq_hash.checkpoint.mainfile import read_main
    from fairseq_hash.checkpoint.manifest import Manifest
    from fairseq_hash.hashing import save_table

    check_out(arguments.out, arguments.overwrite)
    path, number = arguments.checkpoint, arguments.number
    state = read_main(path)
    manifest, options = Manifest.of(state, path), model_options(state)
    num_experts = manifest.num_experts if manifest is not None else options.get("num_experts", 0)
    tables = tables_of(state["model"], options, num_experts)
    if not tables:
        raise UserError(f"{path} has no hash table; give a checkpoint that --router hash trained")
    if number is None and len(tables) > 1:
        raise UserError(f"{path} has {len(tables)} hash tables; choose one by --number 0 to {len(tables) - 1}")
    if number is not None and not 0 <= number < len(tables):
        raise UserError(f"--number {number}: {path} has tables 0 to {len(tables) - 1}")
    save_table(tables[number or 0], arguments.out)
    print(f"wrote {arguments.out}")


def run_verify(arguments: argparse.Namespace) -> None:
    """Check every file, print a line for each, and raise `UserError` at the end if one is missing or damaged."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(highlight=False, soft_wrap=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        checks = Checks(bars)
        for path in arguments.checkpoints:
            checks.check_checkpoint(path)
    if checks.wrong:
        raise UserError(f"{checks.wrong} of {checks.files} files are missing or damaged; use other checkpoints")


class Checks:
    """Checks of files: one line for each file, and how many were checked, and missing or damaged."""

    def __init__(self, bars: "Progress") -> None:  # noqa: F821
        self.bars, self.files, self.wrong, self.bytes = bars, 0, 0, 0
        self.task = bars.add_task("bytes", total=0)
        self.done: set[tuple[Path, Any]] = set()  # main files of one save share their shards

    def check_checkpoint(self, path: Path) -> None:
        """Check a main file with CRC-32 and its shards with SHA-256."""
        import os

        from fairseq_hash.checkpoint.mainfile import read_main
        from fairseq_hash.checkpoint.manifest import Manifest
        from fairseq_hash.checkpoint.sharded_tensor import open_shards
        from fairseq_hash.checkpoint.shards import ShardFile

        manifest = None

        def check_main() -> Iterable[int]:
            nonlocal manifest
            manifest = Manifest.of(read_main(path), path)
            yield size

        def check_shard() -> Iterable[int]:
            return ShardFile(path.parent / shard.file, shard).verify()

        before, wrong = path.stat() if path.is_file() else None, self.wrong
        size = before.st_size if before is not None else 0
        self._expect(size)
        self._check(path, size, check_main)
        shards = manifest.shards if manifest is not None else ()
        shards = [shard for shard in shards if (path.parent, shard) not in self.done]
        self.done.update((path.parent, shard) for shard in shards)
        self._expect(sum(shard.bytes for shard in shards))
        for shard in shards:
            self._check(path.parent / shard.file, shard.bytes, check_shard)
        if self.wrong == wrong and manifest is not None:
            try:
                for part in ("weights", "optimizer"):
                    open_shards(path.parent, manifest, part)
            except UserError as error:  # such as whole files that do not have all experts
                self.wrong += 1
                self._say(f"wrong: {path}: {error}")
        if self.wrong > wrong and path.is_file() and not os.path.samestat(before or path.stat(), path.stat()):
            self._say(f"{path} was replaced by a newer checkpoint while it was checked; verify it again")

    def _expect(self, size: int) -> None:
        """Add bytes that will be read to the progress bar's total."""
        self.bytes += size
        self.bars.update(self.task, total=self.bytes)

    def _check(self, path: Path, size: int, work: Callable[[], Iterable[int]]) -> None:
        """Do the work, which yields the number of bytes it has read, and print whether the file is whole."""
        self.files += 1
        try:
            for count in work():
                self.bars.advance(self.task, count)
        except (UserError, OSError) as error:  # also a disk that fails to read
            self.wrong += 1
            self._say(f"wrong: {error}" if isinstance(error, UserError) else f"wrong: {path}: {error}")
        else:
            self._say(f"ok: {path}, {size:,} bytes")

    def _say(self, text: str) -> None:
        self.bars.console.print(text, markup=False)


def run_show(arguments: argparse.Namespace) -> None:
    """Print the facts of a checkpoint: as tables, or as JSON."""
    import json

    from fairseq_hash.checkpoint.inspection import facts
    from fairseq_hash.checkpoint.loading import read_checkpoint

    path = arguments.checkpoint
    found = facts(path, read_checkpoint(path, is_checked=False))
    if arguments.json:
        print(json.dumps(found))
    else:
        show_facts(found)


def show_facts(found: Mapping[str, Any]) -> None:
    """Print the facts as tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # plain strings would be read as markup

    parameters, sizes = found["parameters"], found["bytes"]
    layers = ", ".join(map(str, found["sparse_layers"]))
    widths = f"D {found['model_width']}" + (f", F {found['expert_hidden_width']}" if found["experts"] else "")
    rows = {
        **{name: found[name] for name in ("file", "kind", "update", "epoch", "router", "experts")},
        "sparse layers": layers or "none",
        "widths": widths,
        "parameters": f"{parameters['total']:,}",
        "of them dense / experts": f"{parameters['dense']:,} / {parameters['experts']:,}",
        "bytes of the main file": f"{sizes['main_file']:,}",
        "bytes of shards, weights / optimizer": f"{sizes['weights_shards']:,} / {sizes['optimizer_shards']:,}",
        "optimizer state": found["optimizer"] or "none",
        "hash table": (found["table_fingerprint"] or "none")[:12],
        "dictionary": (found["dictionary_fingerprint"] or "not known")[:12],
        **found["provenance"],
    }
    console = Console(highlight=False)
    shown = Table(show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows.items():
        value = ", ".join(value) or "none" if isinstance(value, list) else value
        shown.add_row(name, Text("not known" if value is None else str(value)))
    console.print(shown)
    if found["shards"]:
        shards = Table("shard", "part", "experts", "bytes")
        shards.columns[0].overflow = "fold"
        for shard in found["shards"]:
            experts = f"{shard['first']} to {shard['first'] + shard['experts'] - 1}"
            shards.add_row(Text(shard["file"]), shard["part"], experts, f"{shard['bytes']:,}")
        console.print(shards)
