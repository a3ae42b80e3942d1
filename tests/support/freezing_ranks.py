"""Trainings with `--freeze` that stop and go on; `ranks` runs this, and tests call it for one process."""

import recorded
from fairseq import checkpoint_utils
from fairseq.data import iterators
from fairseq.logging import metrics

STOP, END = 2, 4


def copy_of(trainer):
    """Return a copy of parameters and of what Adam holds of them, by name."""
    state = parameters_of(trainer)
    for name, parameter in trainer.get_model().named_parameters():
        moments = trainer.optimizer.optimizer.state.get(parameter, {})
        state.update({f"{name} {key}": moments[key].clone() for key in ("exp_avg", "exp_avg_sq") if key in moments})
    return state


def parameters_of(trainer):
    """Return a copy of the parameters, by name."""
    return {name: p.detach().clone() for name, p in trainer.get_model().named_parameters()}


def stop_and_go_on(data, cases):
    """Return, by case, losses, norms and state of a training that saves at `STOP`, and of one that goes on from there.

    `ranks` runs it, and the test calls it for one process.
    """
    results = {}
    for name, words in cases.items():
        trainer, epoch_itr = recorded.make_trainer(data, words)
        whole_run, start = recorded.keep_losses_and_norms(trainer), parameters_of(trainer)
        with metrics.aggregate("train"):
            for samples in iterators.GroupedIterator(
                epoch_itr.next_epoch_itr(), trainer.cfg.optimization.update_freq[0]
            ):
                trainer.train_step(samples)
                if trainer.get_num_updates() == STOP:
                    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, 1.0)
                    saved = copy_of(trainer)
                if trainer.get_num_updates() == END:
                    break
        whole_run.update(state=copy_of(trainer), start=start)
        trainer, epoch_itr = recorded.make_trainer(data, words)
        resumed, loaded = recorded.keep_losses_and_norms(trainer), copy_of(trainer)
        recorded.run(trainer, epoch_itr, END)
        resumed.update(state=copy_of(trainer), loaded=loaded)
        held = recorded.held_by(trainer.get_model())
        results[name] = {"whole": whole_run, "saved": saved, "resumed": resumed, **held}
    return results
