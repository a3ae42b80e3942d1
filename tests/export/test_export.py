"""Exported models have the logits and the greedy sentences of fairseq's model, for all routers, features and forms."""

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from hash_variants import words_of
from made_exports import NEAR, PADDING, POSITIONS, SPARSE, export, feature, hash_layers, load, save, sentences

transformers = pytest.importorskip("transformers")
K2 = ("--experts-per-token", "2")
LEARNED = (*K2, "--hash-weights", "learned", "--hash-scale", "1.7")
SWIGLU = ("--expert-form", "swiglu")
INSERT = ("--sparse-placement", "insert")
UNSHARED = ("--arch", "hash_transformer_lm", "--decoder-normalize-before")
MODELS = {
    "dense": (),
    "fairseq's transformer_lm": ("--arch", "transformer_lm", "--criterion", "cross_entropy"),
    "dense, gelu, learned positions": (*UNSHARED, "--activation-fn", "gelu", "--decoder-learned-pos"),
    "dense, gelu_accurate, norm of the embedding": (
        *UNSHARED,
        *("--activation-fn", "gelu_accurate", "--layernorm-embedding", "--no-scale-embedding"),
    ),
    "dense, tanh, no positions, no last norm": (
        *UNSHARED,
        *("--activation-fn", "tanh", "--no-token-positional-embeddings", "--no-decoder-final-norm"),
    ),
    "dense, other widths at both ends": (*UNSHARED, "--decoder-input-dim", "24", "--decoder-output-dim", "40"),
    "dense, odd width, linear": (*UNSHARED, "--activation-fn", "linear", "--decoder-embed-dim", "33")
    + ("--decoder-attention-heads", "3", "--decoder-input-dim", "33", "--decoder-output-dim", "33"),
    "hash, balanced": ("--router", "hash", *SPARSE),
    "hash, modulo": hash_layers("--hash-table", "modulo"),
    "hash, round-robin": hash_layers("--hash-table", "round-robin"),
    "hash, a table for each layer": hash_layers("--hash-per-layer"),
    "hash, named tables": hash_layers("--hash-table", "balanced,modulo"),
    "hash, previous": feature("previous"),
    "hash, bigram": feature("bigram"),
    "hash, ngram 3": feature("ngram", "--hash-length", "3"),
    "hash, history 2": feature("history", "--hash-length", "2"),
    "hash, history 20": feature("history", "--hash-length", "20"),
    "hash, position": feature("position"),
    "hash, bigram, a table for each layer": feature("bigram", "--hash-per-layer"),
    "hash, two experts": hash_layers(*K2, "--hash-scale", "1.5"),
    "hash, two experts, scattered": ("--router", "hash", *SPARSE, *K2, "--hash-table", "scattered"),
    "hash, learned weights, softmax": hash_layers(*LEARNED, "--hash-score", "softmax"),
    "hash, learned weights, sigmoid": hash_layers(*LEARNED, "--hash-score", "sigmoid"),
    "hash, learned weights, sqrt-softplus": hash_layers(*LEARNED, "--hash-score", "sqrt-softplus"),
    "hash, 2 segments": hash_layers("--multi-hash", "2"),
    "hash, 4 segments, bigram": feature("bigram", "--multi-hash", "4"),
    "hash, capacity": hash_layers("--eval-capacity-factor", "0.8", *K2),
    "hash, 2 segments, capacity": hash_layers("--eval-capacity-factor", "0.8", "--multi-hash", "2"),
    "hash, swiglu, shared": hash_layers(*SWIGLU, "--swiglu-limit", "0.5", "--shared-expert"),
    "hash, as DeepSeek-V4": hash_layers(*LEARNED, *SWIGLU, "--shared-expert", "--hash-score", "sqrt-softplus"),
    "hash, plain, shared, gelu": hash_layers("--shared-expert", "--activation-fn", "gelu"),
    "hash, inserted": hash_layers(*INSERT, "--expert-sublayers", "2"),
    "hash, inserted, a table for each layer": feature("bigram", *INSERT, "--hash-per-layer"),
    "switch": ("--router", "switch", *SPARSE),
    "switch, capacity": ("--router", "switch", *SPARSE, "--eval-capacity-factor", "1"),
    "switch, swiglu, shared": ("--router", "switch", *SPARSE, *SWIGLU, "--shared-expert"),
    "switch, inserted": ("--router", "switch", *SPARSE, *INSERT),
    "base": ("--router", "base", *SPARSE),
    "base, inserted": ("--router", "base", *SPARSE, *INSERT, "--expert-sublayers", "3"),
    "switch, gate one, norm": ("--router", "switch", *SPARSE, "--gate", "one", "--expert-layer-norm"),
    "base, gate one": ("--router", "base", *SPARSE, "--gate", "one"),
    "hash, scaled": hash_layers("--hash-scale", "0.3"),
    "hash, 2 segments, scaled, norm, shared": hash_layers(
        "--multi-hash", "2", "--hash-scale", "0.3", "--expert-layer-norm", "--shared-expert"
    ),
    "one of each": ("--decoder-layers", "4", "--router", "base,hash,switch", "--sparse-layers", "0,1,3")
    + ("--num-experts", "5", "--hash-table", "random"),
    "one of each, inserted": ("--decoder-layers", "3", "--router", "hash,base,hash", "--sparse-layers", "0,1,2")
    + ("--num-experts", "4", "--hash-table", "random,modulo", *INSERT),
    "hash, spread table": "spread",
    "hash, words": "word",
    "experts at the end only": ("--decoder-layers", "3", "--router", "hash", "--sparse-layers", "2"),
}


# Those whose parts other models of the list have, in another combination.
SLOW = {"hash, modulo", "hash, round-robin", "hash, named tables", "hash, history 2", "hash, two experts, scattered"}
SLOW |= {"hash, bigram, a table for each layer", "hash, 2 segments", "hash, 2 segments, capacity"}
SLOW |= {"hash, inserted, a table for each layer", "switch, swiglu, shared", "switch, inserted"}
SLOW |= {"one of each, inserted", "experts at the end only", "base, gate one", "hash, scaled"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW), id=name) for name in MODELS]
)
def pair(request, data, tmp_path_factory):
    """A model of fairseq's and the same by transformers."""
    folder = tmp_path_factory.mktemp("a model")
    arguments = MODELS[request.param]
    if isinstance(arguments, str):
        arguments = words_of(arguments, data, folder)
    checkpoint, ours, task = save(data, folder / "saved", *arguments)
    return ours, load(export(checkpoint, folder / "exported")), task, request.param


@torch.no_grad()
def test_logits_are_those_of_fairseq(pair):
    """For sentences of one length, and of several with padding behind."""
    ours, theirs, task, _ = pair
    for token_BL in sentences(task):
        expected = ours(token_BL)[0]
        real_BL = token_BL != PADDING
        # With and without the mask that the tokenizer makes: the id of padding says the same.
        for mask in (None, real_BL.long()):
            logits = theirs(input_ids=token_BL, attention_mask=mask).logits
            torch.testing.assert_close(logits[real_BL], expected[real_BL], **NEAR)


@torch.no_grad()
def test_padding_in_front_changes_nothing(pair):
    """As transformers pads for generation; what stands under a mask of 0 does not count."""
    ours, theirs, task, name = pair
    token_BL, _ = sentences(task, rows=1)
    expected = ours(token_BL)[0]
    for filler in (PADDING, 5):
        padded_BL = torch.cat([torch.full((1, 3), filler), token_BL], dim=1)
        mask_BL = torch.cat([torch.zeros(1, 3), torch.ones_like(token_BL)], dim=1)
        logits = theirs(input_ids=padded_BL, attention_mask=mask_BL).logits
        torch.testing.assert_close(logits[:, 3:], expected, **NEAR)


@torch.no_grad()
def test_greedy_sentences_are_those_of_fairseq(pair):
    """Step by step from a cache, all rows at once."""
    ours, theirs, task, name = pair
    if "capacity" in name:
        pytest.skip("what an expert drops depends on all tokens of a pass: fairseq reads a prompt token by token")
    prompt_BL = sentences(task, rows=3, length=5)[0]
    expected = greedy(ours, task, prompt_BL, new=8)
    made_BL = theirs.generate(prompt_BL, do_sample=False, max_new_tokens=8)
    for made, tokens in zip(made_BL[:, 1:].tolist(), expected, strict=True):
        assert made[: len(tokens)] == tokens and set(made[len(tokens) :]) <= {PADDING}


def greedy(model, task, prompt_BL, new):
    """Return the prompts without their beginning and what fairseq's generator adds: to the end of the sentence, or
    `new` tokens."""
    generator = SequenceGenerator([model], task.target_dictionary, beam_size=1, max_len_b=POSITIONS - 2)
    sample = {"net_input": {"src_tokens": prompt_BL, "src_lengths": torch.full((len(prompt_BL),), prompt_BL.shape[1])}}
    found = task.inference_step(generator, [model], sample, prefix_tokens=prompt_BL[:, 1:])
    return [hypotheses[0]["tokens"].tolist()[: prompt_BL.shape[1] - 1 + new] for hypotheses in found]


@torch.no_grad()
def test_a_cache_gives_the_logits_of_one_pass(pair):
    """In steps of several tokens, with padding in front, and with beams that change places."""
    _, theirs, task, name = pair
    if "capacity" in name:
        pytest.skip("what an expert drops depends on all tokens of a pass, as in fairseq")
    token_BL, _ = sentences(task, length=9)
    token_BL[1, :2] = PADDING
    whole = theirs(input_ids=token_BL).logits
    cache, parts = None, []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        output = theirs(
            input_ids=token_BL[:, start:end],
            attention_mask=(token_BL[:, :end] != PADDING).long(),
            past_key_values=cache,
            prefix_ids=token_BL[:, :end],
            use_cache=True,
        )
        cache = output[list(output)[1]]
        parts.append(output.logits)
    real_BL = token_BL != PADDING
    torch.testing.assert_close(torch.cat(parts, dim=1)[real_BL], whole[real_BL], **NEAR)
    prompt_BL = token_BL[:, :5]
    mask_BL = (prompt_BL != PADDING).long()
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "attention_mask": mask_BL}
    assert torch.equal(theirs.generate(prompt_BL, **beams), theirs.generate(prompt_BL, use_cache=False, **beams))
