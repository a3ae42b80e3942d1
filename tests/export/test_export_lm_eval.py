"""EleutherAI's lm-evaluation-harness on an exported model: a task of local files, with fairseq's log-likelihoods.

It is not among the packages of the tests: `pip install "lm_eval[hf]"`, without a network for anything else.
"""

import json
import math

import pytest
import torch
from made_exports import export, hash_layers, modules, save

lm_eval = pytest.importorskip("lm_eval")

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %(file)s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {data_files: {test: %(file)s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}]
"""
DOCUMENTS = [
    {"context": "word1 word2 word3", "choices": ["word4", "word7 word8", "word9"], "label": 0},
    {"context": "word5", "choices": ["word1", "word0 word0 word2"], "label": 1},
    {"context": "word11 word12 unknown word13 word14", "choices": ["word1 word2", "word3"], "label": 1},
]


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """fairseq's model, its dictionary, the exported folder, and a folder of tasks."""
    folder = tmp_path_factory.mktemp("evaluated")
    checkpoint, ours, task = save(data, folder / "run", *hash_layers("--hash-feature", "bigram"))
    (folder / "tasks").mkdir()
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (folder / "tasks" / f"{name}.yaml").write_text(text % {"file": json.dumps(str(file))})
    return ours, task.source_dictionary, export(checkpoint, folder / "model"), folder / "tasks"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    modules()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def evaluate(made, task, **more):
    """Return results and samples of a task."""
    from lm_eval.tasks import TaskManager

    options = {"pretrained": str(made[2]), "trust_remote_code": True, "dtype": "float32", **more}
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=options,
        tasks=[task],
        task_manager=TaskManager(include_path=str(made[3]), include_defaults=False),
        batch_size=2,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    return found["results"][task], found["samples"][task]


@torch.no_grad()
def log_likelihood(made, text, of_last=None):
    """Return the log-likelihood (nats) that fairseq's model gives the last tokens of a text, or all."""
    model, dictionary, _, _ = made
    token_L = dictionary.encode_line(text, add_if_not_exist=False, append_eos=False).long()
    source_BL = torch.cat([torch.tensor([dictionary.eos()]), token_L[:-1]]).unsqueeze(0)
    log_LV = model(source_BL)[0].log_softmax(dim=-1)[0]
    return log_LV.gather(1, token_L.unsqueeze(1))[-(of_last or len(token_L)) :].sum().item()


def test_a_choice_of_continuations(made):
    results, samples = evaluate(made, "local_choice", add_bos_token=True)
    assert len(samples) == len(DOCUMENTS)
    right = 0
    for sample in samples:
        document = sample["doc"]
        expected = [
            log_likelihood(made, f"{document['context']} {choice}", len(choice.split()))
            for choice in document["choices"]
        ]
        got = [float(one[0][0]) for one in sample["resps"]]
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-4)
        right += max(range(len(expected)), key=expected.__getitem__) == document["label"]
    assert results["acc,none"] == pytest.approx(right / len(DOCUMENTS))


def test_the_perplexity_of_texts(made):
    """Rolling: lm_eval puts the beginning in front itself."""
    results, _ = evaluate(made, "local_text", add_bos_token=False)
    texts = [document["context"] for document in DOCUMENTS]
    expected = math.exp(-sum(log_likelihood(made, text) for text in texts) / sum(len(text.split()) for text in texts))
    assert results["word_perplexity,none"] == pytest.approx(expected, rel=1e-4)
