"""What one training does with its checkpoints; `fairseq_patches` calls it where fairseq saves and loads."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairseq_hash.checkpoint.directory import check_start, clean, lock
from fairseq_hash.checkpoint.inspection import model_options
from fairseq_hash.checkpoint.loading import loading_own_state, place_in_epoch
from fairseq_hash.checkpoint.mainfile import read_main
from fairseq_hash.checkpoint.manifest import KEY
from fairseq_hash.checkpoint.model_state import state_of
from fairseq_hash.checkpoint.saving import Saver
from fairseq_hash.checkpoint.upcycling import start_from_dense
from fairseq_hash.core.errors import UserError
from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.parallel.collectives import run_on_all_ranks

if TYPE_CHECKING:
    from fairseq.optim import FairseqOptimizer

logger = logging.getLogger(__name__)


class TrainingCheckpoints:
    """The checkpoints of one of fairseq's trainers.

    With fully sharded data parallel every rank saves what it holds, for the same number of ranks; all others save
    experts in shards.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        model = trainer.get_model()
        layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
        self.parallel = layers[0].parallel if layers else None
        self.is_in_shards = self.parallel is not None and not trainer.is_fsdp
        parallel = self.parallel if self.is_in_shards else None
        facts = {} if trainer.is_fsdp else state_of(model).facts
        self.saver = Saver(model, parallel, facts, lambda: trainer.optimizer)

    def begin(self, cfg: Any) -> None:
        """Check and clean the folder before anything is loaded, as fairseq's `checkpoint` options say.

        Raises:
            UserError: on every rank: another training is in the folder; or there is no checkpoint to go on from where
                there is one to go on from by another name.
        """
        if cfg.write_checkpoints_asynchronously and self.is_in_shards:
            raise UserError("--write-checkpoints-asynchronously does not go with experts in shards; leave it out")
        run_on_all_ranks(lambda: self._begin(cfg))

    def _begin(self, cfg: Any) -> None:
        if state_of(self.trainer.get_model()).is_oracle and cfg.best_checkpoint_metric == "ppl":
            raise UserError("--best-checkpoint-metric ppl: an oracle has no such perplexity; use loss, or oracle_ppl")
        folder = Path(cfg.save_dir)
        if self.trainer.data_parallel_rank == 0 and not cfg.no_save:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
            clean(folder)
        suffix = self.trainer.checkpoint_suffix or ""
        if cfg.restore_file != "checkpoint_last.pt":
            check_start(folder, Path(cfg.restore_file.replace(".pt", f"{suffix}.pt")), is_chosen=True)
            return
        last = folder / f"checkpoint_last{suffix}.pt"
        instead = cfg.continue_once or cfg.finetune_from_model
        if instead and not last.is_file():
            check_start(folder, Path(instead), is_chosen=True)
        check_start(folder, last, is_chosen=False)

    def check_file(self, path: str, with_optimizer: bool) -> None:
        """Raise `UserError` on every rank where a checkpoint has other experts or an optimizer of other parameters.

        At the start of a new training there is no file. `with_optimizer`: whether the optimizer's state is loaded, too.
        """
        run_on_all_ranks(lambda: self._check_file(path, with_optimizer))

    def _check_file(self, path: str, with_optimizer: bool) -> None:
        if not Path(path).is_file():
            return
        state = read_main(path, is_checked=False)
        if self.parallel is not None and self.trainer.is_fsdp and self.parallel.is_shared:
            held = state.get(KEY, {}).get("experts")
            if held != list(self.parallel.expert_ids):
                raise UserError(
                    f"{path} has experts {held}, and rank {self.parallel.rank} holds {list(self.parallel.expert_ids)}; "
                    "resume with the number of ranks and the --expert-placement that saved the checkpoint"
                )
        saved = model_options(state).get("freeze", "none")
        freeze = state_of(self.trainer.get_model()).freeze
        if with_optimizer and state.get("last_optimizer_state") is not None and saved != freeze:
            raise UserError(
                f"{path} was saved with --freeze {saved}, this training has --freeze {freeze}; resume with --freeze "
                f"{saved}, or add --reset-optimizer (--finetune-from-model in a new --save-dir starts a new training)"
            )

    def loaded(self, path: str, extra_state: "dict[str, Any] | None") -> "dict[str, Any] | None":
        """Finish what the trainer has loaded (None: there was no file): the place in the epoch, and a dense start."""
        from_dense = state_of(self.trainer.get_model()).from_dense
        if extra_state is None:
            if from_dense:
                run_on_all_ranks(lambda: start_from_dense(self.trainer.get_model(), from_dense))
                logger.info("started from the dense model in %s", from_dense)
            return None
        if from_dense:
            logger.info("--from-dense %s is for a new training: this one goes on from %s", from_dense, path)
        iterator, again = place_in_epoch(extra_state["train_iterator"], self.trainer.data_parallel_world_size)
        if again:
            logger.info("the number of ranks has changed: %d batches of this epoch come a second time", again)
        return {**extra_state, "train_iterator": iterator}

    def loading_own_state(self, optimizer: "FairseqOptimizer") -> Callable[..., None]:
        """Return the optimizer's `load_state_dict`, made to read this rank's share."""
        return loading_own_state(optimizer, self.trainer.get_model(), self.parallel, optimizer.load_state_dict)

    def save(self, save: Callable[[], None], folder: Path) -> None:
        """Call fairseq's `save` with all ranks taking part."""
        if self.trainer.is_fsdp:
            save()
        else:
            self.saver.run(save, folder)

    def before_main(self, path: Path, extra_state: dict[str, Any]) -> bool:
        """Write the experts of a checkpoint whose main file fairseq is about to write; return whether it may.

        fairseq also saves what it has where the loss is not finite. Several ranks cannot write experts then: who calls
        this is not agreed upon.
        """
        has_others = self.parallel is not None and self.parallel.world_size > 1
        if self.is_in_shards and has_others and not self.saver.is_running:
            logger.warning("%s is not saved: ranks that save experts do that together, and here they do not", path)
            return False
        if "train_iterator" in extra_state:
            extra_state["train_iterator"]["num_shards"] = self.trainer.data_parallel_world_size
        with_optimizer = not self.trainer.cfg.checkpoint.no_save_optimizer_state
        self.saver.write_experts(path.parent, self.trainer.get_num_updates(), with_optimizer)
        return True

    def main_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the trainer's state as the main file has it."""
        self.saver.put_manifest(state)
        if not self.is_in_shards and self.parallel is not None and self.parallel.is_shared:
            state[KEY] = {"experts": list(self.parallel.expert_ids)}
        return state
