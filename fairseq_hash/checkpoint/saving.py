"""Saving: every rank writes its share of the experts, then rank 0 the main file.

The experts of a shard have consecutive ids: a rank that holds others writes one for each run of them. So files say
nothing of who held which experts.

fairseq decides on rank 0 alone whether a checkpoint is written, and under which names. The other ranks wait for its
word: write your experts, or it is done.
"""

import contextlib
import functools
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from fairseq_hash.checkpoint.directory import SHARDS, collect, shard_name
from fairseq_hash.checkpoint.expert_state import expert_numbers, expert_parameters, take_moments
from fairseq_hash.checkpoint.mainfile import cannot_write
from fairseq_hash.checkpoint.manifest import KEY, Manifest
from fairseq_hash.checkpoint.shards import Shard, write_shard
from fairseq_hash.core.errors import UserError
from fairseq_hash.parallel.collectives import gather, run_on_all_ranks
from fairseq_hash.parallel.groups import ExpertParallel, runs_of
from fairseq_hash.provenance import now, provenance

if TYPE_CHECKING:  # checkpoints are read, merged and shown without fairseq
    from fairseq.optim import FairseqOptimizer

WRITE, DONE = "write", "done"


def announce(word: "tuple[str, Any] | None" = None) -> tuple[str, Any]:
    """Return rank 0's word on every rank; all have to call this, and rank 0 gives it."""
    words: list[Any] = [word]
    if dist.is_initialized():
        dist.broadcast_object_list(words, 0)
    return words[0]


class Saver:
    """Saves the model of one training. Without a sparse layer there is nothing but the main file."""

    def __init__(
        self,
        model: nn.Module,
        parallel: "ExpertParallel | None",
        facts: Mapping[str, Any],
        optimizer: "Callable[[], FairseqOptimizer]",
    ) -> None:
        """Take the model, who shares its experts (None: it has none), what a manifest says of it, and its optimizer."""
        self.model, self.parallel, self.facts, self.optimizer = model, parallel, facts, optimizer
        self.manifest: Manifest | None = None
        self.is_running = False

    @functools.cached_property
    def provenance(self) -> dict[str, object]:
        """Versions and hardware; looked up once."""
        return provenance()

    def run(self, save: Callable[[], None], folder: Path) -> None:
        """Call fairseq's `save`, and let all ranks take part in it; every rank has to call this.

        Raises:
            UserError: on every rank, where it failed; no file is left half.
        """
        if dist.is_initialized() and dist.get_rank() > 0:
            save()  # keeps count of the best loss
            self._follow()
            return
        cause: str | None = "rank 0 was interrupted"
        self.is_running = True
        try:
            save()
            cause = None
        except Exception as error:
            cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise
        finally:
            self.is_running = False
            if self.parallel is not None and folder.is_dir():
                collect(folder)
            announce((DONE, cause))

    def _follow(self) -> None:
        """Do what rank 0 says until it is done."""
        while True:
            word, about = announce()
            if word == DONE and about is None:
                return
            if word == DONE:
                raise UserError(about)
            with contextlib.suppress(UserError):  # rank 0 has the same error, and says so
                self._write(*about)

    def write_experts(self, folder: Path, update: int, with_optimizer: bool) -> None:
        """Write the shards of a checkpoint; rank 0 calls this inside of `run`, and all others do the same.

        Raises:
            UserError: where a rank cannot write, or writes to another disc than rank 0.
        """
        save = uuid.uuid4().hex[:8]  # a name, not a random number of the experiment
        if self.parallel is None:
            if self.facts:
                self.manifest = self._manifest(save, update)
        else:
            announce((WRITE, (str(folder), update, save, with_optimizer)))
            self._write(str(folder), update, save, with_optimizer)

    def _write(self, folder: str, update: int, save: str, with_optimizer: bool) -> None:
        numbers = expert_numbers(self.optimizer(), self.model) if with_optimizer else {}
        own = run_on_all_ranks(lambda: self._write_own(Path(folder), update, save, numbers))
        shards = [Shard(**shard) for shards in gather([asdict(shard) for shard in own]) for shard in shards]
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        run_on_all_ranks(lambda: check_visible(Path(folder), shards if is_first else []))
        if is_first:
            self.manifest = self._manifest(save, update, numbers, shards)

    @property
    def _experts(self) -> dict[str, nn.Parameter]:
        """What goes to shards, by name. The main file of a model without experts has its memories itself."""
        return {} if self.parallel is None else expert_parameters(self.model)

    def _manifest(
        self, save: str, update: int, numbers: "dict[str, int] | None" = None, shards: Sequence[Shard] = ()
    ) -> Manifest:
        about = {**self.facts, "provenance": {**self.provenance, "date": now()}}
        experts = tuple(sorted(self._experts))
        return Manifest(save, update, numbers=numbers or {}, experts=experts, shards=tuple(shards), **about)

    def _write_own(self, folder: Path, update: int, save: str, numbers: dict[str, int]) -> list[Shard]:
        weights = self._experts
        parts: dict[str, dict[str, Tensor]] = {"weights": dict(weights)}
        if numbers:
            _, parts["optimizer"] = take_moments(self.optimizer().state_dict(), numbers, weights)
        assert self.parallel is not None, "a dense model has no shards"
        held = list(self.parallel.expert_ids)
        about = {"save": save, "update": update}
        shards = []
        for part, tensors in parts.items():
            for experts in runs_of(self.parallel.saved_experts) if tensors else ():
                file = shard_name(update, save, part, experts)
                first = held.index(experts[0])
                rows = {name: tensor[first : first + len(experts)] for name, tensor in tensors.items()}
                try:
                    (folder / SHARDS).mkdir(exist_ok=True)
                    shards.append(write_shard(folder, file, part, experts, rows, about))
                except OSError as error:
                    raise UserError(cannot_write(folder / file, error)) from error
        return shards

    def put_manifest(self, state: dict[str, Any]) -> None:
        """Take the experts out of a state that fairseq is about to write, and put the manifest of this save in."""
        if self.manifest is None:  # not while a checkpoint is written
            return
        weights = self._experts
        for name in weights:
            del state["model"][name]
        if self.manifest.numbers:
            optimizer = state["last_optimizer_state"]
            state["last_optimizer_state"], _ = take_moments(optimizer, self.manifest.numbers, weights)
        state[KEY] = self.manifest.to_plain()
        self.manifest = None


def check_visible(folder: Path, shards: list[Shard]) -> None:
    """Raise `UserError` where this rank does not see a shard that another has written."""
    for shard in shards:
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise UserError(
                f"{path} was written by another rank and is not here; give a --save-dir on a disc that all ranks share"
            )
