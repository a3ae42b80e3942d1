"""The experiments of `configs/`: each composes, its model has the published size, and it is what its name says.

By default these are a few of each table (`FEW`); with `-m slow` all of them.
The reference for sizes is arithmetic written out here, from the widths and numbers in the configuration alone.
"""

from pathlib import Path

import pytest
import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.language_modeling import LanguageModelingTask
from hydra_configs import needs_current_hydra
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fairseq_hash.experiments.compose import compose, experiment_names
from fairseq_hash.experiments.flags import flags
from fairseq_hash.experiments.sizes import dense_twin, sizes

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = needs_current_hydra
# test_routers_2026 has the others.
NAMES = [name for name in experiment_names(CONFIGS) if not name.startswith(("routers_2026/", "first_k/"))]
SPECIAL_SYMBOLS = 4  # of fairseq's dictionaries
FEW = ["laptop/dense", "laptop/hash", "laptop/switch", "laptop/finetune", "one_gpu/hash", "cc100_en/hash_3x_4.5b"]
FEW += ["reddit/dense", "reddit/hash_5x16", "reddit/multi_hash_4_1x64", "stablemoe/dense", "stablemoe/base"]
FEW += ["wikitext103/hash_words", "hash_first/hash_top2_learned"]


def few(names):
    """Return parameters of a test: names of experiments, of which all but a few are slow."""
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def composed():
    """Every experiment by its name, composed once, with its sizes."""
    found = {}

    def get(name):
        if name not in found:
            given = ["checkpoint.finetune_from_model=checkpoint_best.pt"] if name.endswith("finetune") else []
            experiment = compose(CONFIGS, name, given)
            found[name] = experiment, sizes(experiment)
        return found[name]

    return get


def by_hand(model, vocabulary):
    """Return (total, active) parameters of a configuration, counted from its numbers."""
    width, hidden, layers = model.decoder_embed_dim, model.decoder_ffn_embed_dim, model.decoder_layers
    norm = 2 * width
    ffn = width * hidden + hidden + hidden * width + width
    attention = 4 * (width * width + width)
    dense = (vocabulary + SPECIAL_SYMBOLS) * width + layers * (attention + ffn + 2 * norm) + norm
    if model.router == "none":
        return dense, dense
    total = active = dense
    places = model.sparse_layers.split(",")
    routers = model.router.split(",") * (1 if "," in model.router else len(places))
    expert = ffn if model.expert_form == "plain" else 3 * width * hidden
    for router in routers:
        if model.sparse_placement == "insert":
            one = model.expert_sublayers * (norm + ffn)
        else:
            one, total, active = expert, total - ffn, active - ffn
        learns = router != "hash" or model.hash_weights == "learned"
        used = model.experts_per_token if router == "hash" else 1
        total += model.num_experts * one + learns * model.num_experts * width
        active += used * one + learns * model.num_experts * width
    return total, active


@pytest.mark.parametrize("name", few(NAMES))
def test_the_model_has_the_parameters_that_its_numbers_make(name, composed):
    experiment, of = composed(name)
    assert (of.total, of.active) == by_hand(experiment.config.model, experiment.about["vocabulary"])


PUBLISHED = {"hash_1x64": 529, "switch_1x64": 529, "deeper": 529, "wider": 529, "hash_1x128": 1066}
PUBLISHED |= {"switch_1x128": 1066, "hash_5x16": 630, "switch_5x16": 630}


@pytest.mark.parametrize("name", few([*(f"reddit/{name}" for name in PUBLISHED), "cc100_en/hash_1x64"]))
def test_published_differences_to_dense(name, composed):
    """In millions, as published; a router's own weights are at most 0.1."""
    table, of = name.split("/")
    more = composed(name)[1].total - composed(f"{table}/dense")[1].total
    assert more / 1e6 == pytest.approx(PUBLISHED[of], abs=0.51)


def test_without_its_experts_a_model_is_the_dense_one(composed):
    """What `plan --all` subtracts."""
    assert sizes(dense_twin(composed("reddit/hash_5x16")[0])).total == composed("reddit/dense")[1].total
    assert sizes(dense_twin(composed("stablemoe/base")[0])).total == composed("stablemoe/dense")[1].total


@pytest.mark.parametrize("name", few([name for name in NAMES if name.endswith("4.5b")]))
def test_published_4_5_billion(name, composed):
    assert f"{composed(name)[1].total / 1e9:.1f}" == "4.5"


@pytest.mark.parametrize("name", few([name for name in NAMES if "stablemoe" in name and "dense" not in name]))
def test_published_578_million(name, composed):
    """StableMoE's table 2."""
    assert f"{composed(name)[1].total / 1e6:.0f}" == "578"


@pytest.mark.parametrize("name", few([name for name in NAMES if "hash" in name.split("/")[1] and "first" not in name]))
def test_a_hash_layer_works_as_much_as_the_dense_one(name, composed):
    """In place of an FFN a hash layer does the dense layer's products; inserted ones do as much as one another."""
    table = name.partition("/")[0]
    inserted = {"cc100_en/hash_4.5b", "cc100_en/hash_3x_4.5b"}
    rival = "cc100_en/hash_4.5b" if name in inserted else "stablemoe/hash" if table == "stablemoe" else None
    words = "_words" if name.endswith("_words") else "_bpe" if table == "wikitext103" else ""
    mine, other = composed(name)[1], composed(rival or f"{table}/dense{words}")[1]
    assert mine.flops_per_token == other.flops_per_token
    assert mine.attention_flops_per_token == other.attention_flops_per_token
    assert (mine.tokens_per_update, mine.updates) == (other.tokens_per_update, other.updates)


@pytest.mark.parametrize("name", few([n for n in NAMES if n.split("/")[1].split("_")[0] in ("switch", "base")]))
def test_a_learned_router_adds_its_own_products_only(name, composed):
    """E x D multiply-adds a layer more than the hash layer of the same name."""
    if name == "hash_first/switch":
        rival = "hash_first/hash"
    else:
        rival = name.replace("/switch", "/hash").replace("/base", "/hash")
    (experiment, mine), (_, other) = composed(name), composed(rival)
    model = experiment.config.model
    learned = len(model.sparse_layers.split(",")) - (9 if name == "hash_first/switch" else 0)
    more = 2 * learned * model.num_experts * model.decoder_embed_dim
    assert mine.flops_per_token - other.flops_per_token == more


OTHERS = ("switch router=stablemoe", "switch router=random_linear")
OTHERS += (
    "switch model.router=topk model.router_jitter=0 +model.experts_per_token=2",
    'dense +model.memory_layers="0,1"',
)


@pytest.mark.parametrize("router", ["dense", "hash", "multi_hash_2", "switch", "base", *OTHERS])
def test_work_is_what_pytorch_counts(router):
    """Of a real forward pass over full contexts, every matrix product that PyTorch sees."""
    small = ["experiment.vocabulary=90", "task.tokens_per_sample=16", "model.decoder_embed_dim=32"]
    name, *given = router.split()
    experiment = compose(CONFIGS, f"laptop/{name}", [*given, *small])
    dictionary = Dictionary()
    for number in range(experiment.about["vocabulary"]):
        dictionary.add_symbol(f"s{number}", n=100 - number)
    task = LanguageModelingTask(experiment.config.task, dictionary)
    model = task.build_model(experiment.config.model).eval()
    token_BL = torch.randint(4, len(dictionary), (3, 16), generator=torch.Generator().manual_seed(1))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the other kernels of a CPU are not counted
        model(token_BL)
    of = sizes(experiment)
    assert counter.get_total_flops() == token_BL.numel() * (of.flops_per_token + of.attention_flops_per_token)


@pytest.mark.parametrize("name", few(NAMES))
def test_flags_make_the_same_configuration(name, composed):
    """What fairseq-train makes of the flags is what fairseq-hydra-train composes, option by option."""
    experiment, _ = composed(name)
    args = options.parse_args_and_arch(options.get_training_parser(), flags(experiment.config))
    by_flags = OmegaConf.to_container(convert_namespace_to_omegaconf(args))
    by_hydra = OmegaConf.to_container(experiment.config)
    assert by_flags.pop("scoring") == {"_name": "bleu", "pad": 1, "eos": 2, "unk": 3}  # of translation: not used here
    assert {key: value for key, value in by_flags.items() if value} == {k: v for k, v in by_hydra.items() if v}


SOME_AND_ALL = pytest.mark.parametrize("names", [FEW, pytest.param(NAMES, marks=pytest.mark.slow)], ids=["few", "all"])


@SOME_AND_ALL
def test_a_batch_is_the_same_in_a_table(names, composed):
    """All experiments of a folder, fine-tuning apart, learn from as many tokens: what the comparison is about."""
    budgets = {}
    for name in names:
        if name.endswith("finetune"):
            continue
        of = composed(name)[1]
        kind = name.partition("/")[0] + (" 4.5b" if name.endswith("4.5b") else "")
        budgets.setdefault(kind, set()).add((of.tokens_per_update, of.updates))
    assert {kind: len(found) for kind, found in budgets.items()} == dict.fromkeys(budgets, 1)


@SOME_AND_ALL
def test_published_figures_have_their_mark(names, composed):
    """Only figures marked A (the authors' own) or S (secondary, agreeing) are beside results."""
    for name in names:
        published = dict(composed(name)[0].about["published"])
        by_update = published.pop("valid_by_update", {})
        for text in [*published.values(), *by_update.values()]:
            figure, mark = text.split()
            assert float(figure) > 0 and mark in "AS", name
