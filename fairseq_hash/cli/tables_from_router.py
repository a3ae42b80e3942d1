"""`fairseq-hash tables from-router`: the distilled table of a trained router."""

import argparse
from pathlib import Path
from typing import Any

from fairseq_hash.cli.arguments import add_out
from fairseq_hash.cli.sample import add_model, load_model
from fairseq_hash.core.errors import UserError
from fairseq_hash.core.files import check_out
from fairseq_hash.core.validators import check_at_least


def add_verb_from_router(verbs: Any) -> None:
    """Add the verb `from-router` below `tables`."""
    parser = verbs.add_parser(
        "from-router",
        help="make a table from a trained router: each token's most frequent experts",
        description="Run a trained model over a text and write a table of each token's most frequent experts under "
        "one layer's router, for --router hash --hash-table FILE.",
    )
    add_model(parser)
    add = parser.add_argument
    text = "text to run: a file of symbols, a binarized text or a data folder"
    add("--text", type=Path, required=True, metavar="PATH", help=text)
    add("--subset", default="train", help="subset of --text, if it is a data folder (default: train)")
    add("--layer", type=int, metavar="N", help="decoder layer, from 0 (default: the only one with a router)")
    add("--experts-per-token", type=int, default=1, metavar="K", help="most frequent experts to keep (default: 1)")
    add("--tokens-per-sample", type=int, metavar="N", help="tokens of a sample (default: those of the training)")
    add_out(add, "table file to write (safetensors)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Load the model, count its routes on the text, and write the table."""
    check_at_least("--experts-per-token", arguments.experts_per_token, 1)
    check_out(arguments.out, arguments.overwrite)
    model = load_model(arguments)

    from fairseq_hash.api.route_counts import count_routes, layer_with_router, sample_length
    from fairseq_hash.hashing import HashTable, TableShape, save_table
    from fairseq_hash.hashing.balance import judge
    from fairseq_hash.hashing.build import record_of
    from fairseq_hash.hashing.builders import check_columns
    from fairseq_hash.table_tools.balance_report import show
    from fairseq_hash.table_tools.count_keys import reading
    from fairseq_hash.table_tools.distilled import distilled_experts, share_of_choices
    from fairseq_hash.table_tools.evaluate_balance import Judged, JudgedTable
    from fairseq_hash.table_tools.token_streams import open_text

    if not model.num_experts:
        raise UserError(f"{arguments.checkpoint} has no experts; give a checkpoint of a model with a router")
    check_columns(model.num_experts, arguments.experts_per_token)
    layer = layer_with_router(model, arguments.layer)
    length = sample_length(model, arguments.tokens_per_sample)
    symbols = model.dictionary.symbols
    text = open_text(arguments.text, arguments.subset, symbols)
    with reading(text) as blocks:
        chosen_VE, count_V = count_routes(model, blocks, layer, length)
    text.say_unknown(print)

    expert_VK = distilled_experts(chosen_VE, count_V, arguments.experts_per_token)
    share, unseen = share_of_choices(chosen_VE, expert_VK), int((count_V == 0).sum())
    shape = TableShape(model.num_experts, arguments.experts_per_token)
    settings = {"checkpoint": arguments.checkpoint.name, "layer": layer, "counts": f"text {arguments.text.name}"}
    settings |= {"share_of_choices": share, "unseen_tokens": unseen}
    table = HashTable(expert_VK, record_of("distilled", symbols, shape, counts=count_V, settings=settings))
    save_table(table, arguments.out)
    print(f"wrote {arguments.out}")
    print(f"the table has {share:.1%} of the router's choices on this text")
    if unseen:
        print(f"note: {unseen:,} of {len(symbols):,} symbols do not occur; they have the experts with the least load")
    balance = judge(expert_VK, count_V, model.num_experts)
    show(
        [JudgedTable(arguments.out.name, table, [Judged("building counts", str(text.path), count_V, balance)])], symbols
    )
