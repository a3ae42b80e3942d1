"""The exported tokenizer: the ids that the data of a training has, for pieces and words, on random and nasty text."""

import json
import random
import shutil
import unicodedata

import pytest
import sentencepiece
import torch
from called import refused
from fairseq.data import Dictionary
from hypothesis import given
from hypothesis import strategies as st
from made_exports import export, hash_layers, load, modules, save
from one_process import one_process
from prepared import arguments, write_text

from data_prep import pieces
from data_prep.cli import main

transformers = pytest.importorskip("transformers")

NASTY = [
    *("", " ", "\t", "a", " a  b ", "a\tb\u00a0c", "a\u0085b", "a\u2028b\u2029c", "a\x0bb\x0cc", "\ufeffa", "a\u200bb"),
    *("</s>", "a </s> b", "<pad>", "x<pad>y", "<s> a", "<unk>", "a <unk> b", "<0x41>", "\u2581", "a\u2581b"),
    *("\u2581\u2581a", "madeupword0000", "\x00", "a\x1b[0mb", "\u2585", "e\u0301", "\u00e9", "\ufb01", "\u2460"),
    *("\uff21", "\u0130", "\U0001f600", "a\U0001f469\u200d\U0001f467b", "\u05d0\u05d1", "\u4f60\u597d", "a\r"),
    *("\u0928\u092e\u0938\u094d\u0924\u0947", "a" * 20, "ab" * 6, "ab" * 300, "\ud7ff", "\U0010ffff"),
    "#fairseq:overwrite",
]


@pytest.fixture(scope="module", params=["pieces", "words"])
def tokens(request, tmp_path_factory):
    """The folder of some data, and the tokenizer of a model of it."""
    folder = tmp_path_factory.mktemp(f"the {request.param}")
    files = write_text(folder / "text")
    more = ("--vocab-size", "300") if request.param == "pieces" else ("--words",)
    with one_process():
        assert main(arguments(files, folder / "data", *more)) == 0
    checkpoint, _, _ = save(folder / "data", folder / "run", *hash_layers())
    out = export(checkpoint, folder / "model")
    modules()
    return folder, transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)


def in_the_data(folder, line):
    """Return the ids that data_prep and fairseq's dictionary make of a line, without its end."""
    model = folder / "data" / "sentencepiece.model"
    dictionary = Dictionary.load(str(folder / "data" / "dict.txt"))
    pieces.load(str(model) if model.is_file() else None, dictionary.indices)
    return pieces.ids_of([line])[0][:-1].tolist()


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text(tokens, text):
    folder, tokenizer = tokens
    assert tokenizer(text)["input_ids"] == [2, *in_the_data(folder, text)]


def test_random_text(tokens):
    """Of the characters of the training, of ASCII, of all planes, and of spaces."""
    folder, tokenizer = tokens

    @given(st.text(st.sampled_from("abcdefghij  ")) | st.text(st.characters(max_codepoint=127)) | st.text())
    def check(text):
        line = text.replace("\n", " ")
        assert tokenizer.encode(line, add_special_tokens=False) == in_the_data(folder, line)

    check()


def test_lines_and_back(tokens):
    """The end of a line is `</s>`; decoding gives the text back."""
    folder, tokenizer = tokens
    lines = (folder / "text" / "train.txt").read_text().split("\n")[:3]
    expected = [2, *in_the_data(folder, lines[0]), 2, *in_the_data(folder, lines[1]), 2, *in_the_data(folder, lines[2])]
    assert tokenizer("\n".join(lines))["input_ids"] == expected
    assert tokenizer.decode(expected[1:]) == "\n".join(lines)
    assert tokenizer.decode(in_the_data(folder, lines[0]), skip_special_tokens=True) == lines[0]


def test_bytes_come_back(tokens):
    """Characters that the model does not know, in SentencePiece's normal form."""
    folder, tokenizer = tokens
    if not (folder / "data" / "sentencepiece.model").is_file():
        pytest.skip("words have no bytes")
    text = "caf\u00e9 \u4f60 \U0001f600"
    decoded = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    assert decoded == unicodedata.normalize("NFKC", text)


def test_the_vocabulary_is_the_dictionary(tokens, tmp_path):
    folder, tokenizer = tokens
    dictionary = Dictionary.load(str(folder / "data" / "dict.txt"))
    assert len(tokenizer) == tokenizer.vocab_size == len(dictionary)
    assert tokenizer.get_vocab() == dictionary.indices
    assert tokenizer.convert_ids_to_tokens(list(range(len(dictionary)))) == dictionary.symbols
    special = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (2, 1, 2, 3)
    tokenizer.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again("a bc\ndef")["input_ids"] == tokenizer("a bc\ndef")["input_ids"]


def test_batches_are_padded_in_front(tokens):
    """As generation needs it; a batch goes on as its sentences alone."""
    folder, tokenizer = tokens
    model = load(folder / "model")
    texts = [line for line in (folder / "text" / "train.txt").read_text().split("\n")[:6] if line]
    prompts = [" ".join(text.split()[: 1 + number % 2]) for number, text in enumerate(texts)]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    rows, length = batch["input_ids"].shape
    assert "token_type_ids" not in batch and (batch["input_ids"][:, -1] != 1).all() and rows == len(prompts)
    with torch.no_grad():
        made = model.generate(**batch, do_sample=False, max_new_tokens=3)
        for row, prompt in zip(made.tolist(), prompts, strict=True):
            alone = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=3)
            assert row[length - batch["attention_mask"][made.tolist().index(row)].sum() :] == alone[0].tolist()


def test_begin_of_samples(tokens, tmp_path):
    folder, _ = tokens
    checkpoint, _, _ = save(folder / "data", tmp_path / "run", *hash_layers(), "--add-bos-token")
    out = export(checkpoint, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 0 and tokenizer.eos_token_id == 2
    assert json.loads((out / "generation_config.json").read_text())["bos_token_id"] == 0


def test_where_the_dictionary_is(tokens, tmp_path):
    """Beside the checkpoint, where the data is gone; a SentencePiece model by name; another one is refused."""
    folder, tokenizer = tokens
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    checkpoint, _, _ = save(data, tmp_path / "run", *hash_layers())
    shutil.move(data / "dict.txt", checkpoint.parent / "dict.txt")
    model = data / "sentencepiece.model"
    if not model.is_file():
        export(checkpoint, tmp_path / "model")
        return
    said = refused("export", checkpoint, "--to", "hf", tmp_path / "model")
    assert "has pieces of SentencePiece (\u2581) and" in said and said.endswith("give the model by --sentencepiece")
    out = export(checkpoint, tmp_path / "model", "--sentencepiece", model)
    again = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert again("abc def")["input_ids"] == tokenizer("abc def")["input_ids"]
    generator = random.Random(1)
    words = ["".join(generator.choices("klmnopqrst", k=5)) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "other"), vocab_size=60, minloglevel=2
    )
    said = refused("export", checkpoint, "--to", "hf", tmp_path / "m", "--sentencepiece", tmp_path / "other.model")
    assert "does not cut text into the symbols of the dictionary" in said
