"""`fairseq-hash plan`: the sizes, cost and checks of an experiment's configuration, before anything runs."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import fairseq_hash
from fairseq_hash.cli import plan_dry_run, plan_loads
from fairseq_hash.core.errors import UserError
from fairseq_hash.experiments.names import experiment_names, own_configs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb `plan`, and add its arguments."""
    parser.description = (
        "Compose a configuration as fairseq-hydra-train does, and print what it means: parameters, work, memory. "
        "Without one of --list, --all, --check, --flags, --run-dir, --loads, --dry-run and --calibrate, print the "
        "table of one experiment."
    )
    add = parser.add_argument
    add("--config-dir", type=Path, default=own_configs(), metavar="DIR", help="default: the project's own")
    add("--config-name", metavar="NAME", help="experiment, such as reddit/hash_1x64")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, as in fairseq-hydra-train")
    add("--ranks", type=int, default=1, metavar="N", help="number of ranks (GPUs) for the training, default 1")
    add("--tflops", type=float, default=300.0, help="real speed of one GPU, in 10^12 FLOPs/s; default 300")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--list", action="store_true", help="print the names of all experiments")
    choice.add_argument("--all", action="store_true", help="print the sizes of all experiments, as Markdown")
    choice.add_argument("--check", action="store_true", help="only check data, files and ranks: one line on an error")
    choice.add_argument("--flags", action="store_true", help="print the same experiment as arguments of fairseq-train")
    choice.add_argument("--run-dir", action="store_true", help="print only the run's folder")
    choice.add_argument(
        "--loads",
        action="store_true",
        help="print the loads of experts and ranks, stragglers and dropped tokens, by the hash tables or by a run",
    )
    choice.add_argument(
        "--dry-run",
        action="store_true",
        help="run one update of one rank through the real trainer, without data: memory, bytes between ranks, time",
    )
    choice.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this CPU, and write FILE for --gpu")
    plan_loads.add_arguments(parser)
    plan_dry_run.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print what was asked for."""
    if arguments.ranks < 1 or not arguments.tflops > 0:
        raise UserError("--ranks takes a number of 1 or more, --tflops one of more than 0")
    plan_loads.check_arguments(arguments)
    plan_dry_run.check_arguments(arguments)
    if arguments.list:
        print("\n".join(experiment_names(arguments.config_dir)))
        return
    if arguments.calibrate:
        from fairseq_hash.dry_run.calibrate import calibrate

        calibrate(arguments.calibrate)
        return
    fairseq_hash.register()
    from fairseq_hash.experiments.checks import check_experiment
    from fairseq_hash.experiments.compose import compose
    from fairseq_hash.experiments.flags import flags

    if arguments.all:
        print_all(arguments.config_dir, arguments.tflops)
        return
    if not arguments.config_name:
        raise UserError("--config-name is missing; fairseq-hash plan --list names all experiments")
    experiment = compose(arguments.config_dir, arguments.config_name, arguments.overrides)
    if arguments.run_dir:
        print(experiment.folder)
    elif arguments.flags:
        print(shlex.join(flags(experiment.config)))
    elif arguments.loads:
        plan_loads.run(experiment, arguments)
    elif arguments.check:
        check_experiment(experiment, arguments.ranks)
    elif arguments.dry_run:
        plan_dry_run.run(experiment, arguments)
    else:
        print_one(experiment, arguments.ranks, arguments.tflops)


def print_one(experiment: Any, ranks: int, tflops: float) -> None:
    """Print one experiment's sizes and cost, and whether it could start."""
    from fairseq_hash.experiments.checks import check_experiment, in_vain
    from fairseq_hash.experiments.memory import describe
    from fairseq_hash.experiments.sizes import sizes

    of = sizes(experiment, ranks)
    try:
        memory = describe(of, experiment.config, ranks)
    except UserError:  # `check_experiment` prints the same reason below
        memory = "not known: this number of ranks cannot share the experts"
    try:
        check_experiment(experiment, ranks)
        state = f"all is there for {ranks} rank{'s' if ranks > 1 else ''}"
    except UserError as error:
        state = f"not yet: {error}"
    memories = f", memories {of.memory_parameters:,}" if of.memory_parameters else ""
    rows = {
        "Parameters": f"{of.total:,}, of which experts {of.expert_parameters - of.memory_parameters:,}{memories}",
        "Parameters that a token uses": f"{of.active:,}",
        "Work for a token, forward": f"{of.flops_per_token / 1e9:.4g} GFLOPs, "
        f"and {of.attention_flops_per_token / 1e9:.4g} of attention over a full context",
        "Batch": f"{of.tokens_per_update:,} tokens, {of.updates:,} updates, "
        f"{of.tokens_per_update * of.updates / 1e9:.3g} billion tokens",
        "Training": f"{of.training_flops:.3g} FLOPs: {gpu_hours(of.training_flops, tflops)} at {tflops:g} TFLOPs/s",
        "Weights, gradients, optimizer": memory,
        "Published": ", ".join(f"{key} {value}" for key, value in experiment.about["published"].items()) or "–",
        "Folder": str(experiment.folder),
        "To start": state,
    }
    if unused := in_vain(experiment.config):
        rows["Of no use here"] = ", ".join(unused)
    print(experiment.name)
    for heading, text in rows.items():
        print(f"  {heading:<30}{text}")


def print_all(config_dir: Path, tflops: float) -> None:
    """Print the sizes of all experiments as a Markdown table, beside the same model without experts."""
    import pandas as pd
    from rich.progress import track

    from fairseq_hash.experiments.compose import compose
    from fairseq_hash.experiments.sizes import dense_twin, sizes
    from fairseq_hash.reporting.comparison_table import count_text, markdown

    rows = []
    for name in track(experiment_names(config_dir), "composing", transient=True):
        missing = ["checkpoint.finetune_from_model=checkpoint_best.pt"] if name.endswith("finetune") else []
        experiment = compose(config_dir, name, missing)
        of = sizes(experiment)
        is_dense = experiment.config.model.router in ("", "none")
        published = experiment.about["published"]
        rows.append(
            {
                "Experiment": f"`{name}`",
                "Parameters": count_text(of.total),
                "More than dense": "–" if is_dense else count_text(of.total - sizes(dense_twin(experiment)).total),
                "Active": count_text(of.active),
                "GFLOPs a token": f"{of.flops_per_token / 1e9:.4g}",
                "Tokens an update": f"{of.tokens_per_update:,}",
                "Updates": f"{of.updates:,}",
                "Cost": gpu_hours(of.training_flops, tflops),
                "Published valid": published.get("valid", "–"),
                "Published test": published.get("test", "–"),
            }
        )
    print(markdown(pd.DataFrame(rows)))


def gpu_hours(flops: float, tflops: float) -> str:
    """Return the time that one GPU of `tflops` x 10^12 FLOPs/s needs, as text."""
    seconds = flops / (tflops * 1e12)
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:,.{0 if seconds >= 10 * length else 1}f} GPU {unit}"
    return "less than a GPU minute"
