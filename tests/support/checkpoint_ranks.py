"""What several ranks do with checkpoints; `ranks` runs these functions, and tests call them for one process."""

import threading
import time

import recorded
from fairseq import checkpoint_utils


def save(data, arguments, updates):
    """Train, save, and return losses, norms, parameters and Adam's moments."""
    trainer, epoch_itr = recorded.make_trainer(data, arguments)
    record = recorded.keep_losses_and_norms(trainer)
    recorded.run(trainer, epoch_itr, updates)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    return {**record, "state": state_of(trainer), **recorded.held_by(trainer.get_model())}


def resume_all(data, cases, updates):
    """Load checkpoints and train on; return, by case, what was loaded, and losses and parameters at the end.

    `cases` are arguments by name.
    """
    results = {}
    for name, arguments in cases.items():
        trainer, epoch_itr = recorded.make_trainer(data, arguments)
        record = recorded.keep_losses_and_norms(trainer)
        loaded, at = state_of(trainer), trainer.get_num_updates()
        recorded.run(trainer, epoch_itr, updates)
        held = recorded.held_by(trainer.get_model())
        results[name] = {**record, "loaded": loaded, "at": at, "state": state_of(trainer), **held}
    return results


def state_of(trainer):
    """Return parameters and an optimizer's moments by name, copied."""
    parameters = dict(trainer.get_model().named_parameters())
    moments = trainer.optimizer.optimizer.state
    state = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state.update({f"{name} {key}": moments[parameter][key].cpu().clone() for key in ("exp_avg", "exp_avg_sq")})
    return state


def half_state_of(trainer):
    """Return parameters and moments by name where the optimizer may work on fp32 copies."""
    optimizer = trainer.optimizer
    copies = getattr(optimizer, "fp32_params", None) or list(trainer.get_model().parameters())
    state = {}
    for (name, parameter), copy in zip(trainer.get_model().named_parameters(), copies, strict=True):
        moments = optimizer.optimizer.state[copy]
        state[name] = parameter.detach().clone()
        state.update({f"{name} {key}": moments[key].clone() for key in ("exp_avg", "exp_avg_sq")})
    return state


def save_half(data, arguments, updates):
    """Train in half precision, save, and return parameters and moments."""
    trainer, epoch_itr = recorded.make_trainer(data, arguments)
    recorded.run(trainer, epoch_itr, updates)
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
    return half_state_of(trainer)


def load_half(data, arguments):
    """Return parameters and moments of a loaded checkpoint."""
    return half_state_of(recorded.make_trainer(data, arguments)[0])


class PeakMemory:
    """Notes the most memory of its own (not of files) that this process has while in the context, in bytes."""

    def __enter__(self):
        self.before = self.peak = own_memory()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.is_over.is_set():
            self.peak = max(self.peak, own_memory())
            time.sleep(0.001)

    def __exit__(self, *error):
        self.is_over.set()
        self.thread.join()
        self.grown = self.peak - self.before


def own_memory():
    """Return the bytes of memory that belong to no file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def load_and_measure(data, arguments):
    """Return the peak memory of building and loading, and the bytes that parameters and moments take after it."""
    recorded.make_trainer(data, (*arguments, "--no-save", "--save-dir", "nowhere"))  # all that is made only once
    with PeakMemory() as memory:
        trainer, _ = recorded.make_trainer(data, arguments)
    return memory.grown, sum(tensor.nbytes for tensor in state_of(trainer).values())
