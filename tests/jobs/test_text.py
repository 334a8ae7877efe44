"""Windows of tokens from texts."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
from tiny import TEMPLATE, byte_tokenizer, chat_tokenizer, tokens, write_tiny
from tokenizers.processors import TemplateProcessing

from prox24 import BlockRefinement, Recipe, Text, prune
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs import generated
from prox24._jobs.text import calibration_windows, evaluation_windows
from prox24._jobs.tokens import available_windows, check_length, start_tokens, tokenize
from prox24.errors import CalibrationError, Prox24Error, RecipeError

IDS = np.arange(103, dtype=np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "model"
    write_tiny(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def chat_checkpoint(tmp_path_factory):
    """A model whose tokenizer begins texts with a start token, and so does its chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    write_tiny(folder, bos_token_id=256, eos_token_id=257)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    tokenizer.save_pretrained(folder)
    return open_checkpoint(folder)


def test_ids_without_an_embedding_are_refused():
    assert tokenize(byte_tokenizer(), "abc", 260).max() < 260
    with pytest.raises(CalibrationError, match=r"gives id \d+ but the model has 50 embeddings"):
        tokenize(byte_tokenizer(), "abc", 50)


def test_every_window_begins_with_the_start_tokens_and_none_of_the_text_is_lost():
    windows = available_windows(IDS, 12, 10, [7, 8])
    assert windows.shape == (12, 10)
    assert np.all(windows[:, :2] == [7, 8])
    assert windows[:, 2:].ravel().tolist() == list(range(96))
    with pytest.raises(CalibrationError, match="windows of 2 have no room beside 2 start tokens"):
        available_windows(IDS, 1, 2, [7, 8])


def test_a_tokenizer_whose_start_cannot_be_told_apart_is_refused():
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [1, 9] if add_special_tokens else [8]}

    with pytest.raises(CalibrationError, match=r"encodes 'a' as \[8\], and as \[1, 9\]"):
        start_tokens(tokenizer, 16)


def test_a_model_takes_a_text_or_its_tokens(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("0123456789" * 3)
    text = Text(tmp_path / "text.txt", samples=2, sequence_length=10)
    digits = tokenize(byte_tokenizer(), "0123456789", 260)
    for windows in (calibration_windows, evaluation_windows):
        assert np.array_equal(windows(checkpoint, text), [digits, digits])
        assert windows(checkpoint, Text(samples=3, sequence_length=16)).shape == (3, 16)
        given = tokens(3, 5).astype(np.int64)
        assert np.array_equal(windows(checkpoint, given), given)
    with pytest.raises(CalibrationError, match=r"the text is a path: give prox24.Text\('a.txt'\)"):
        evaluation_windows(checkpoint, "a.txt")
    by_default = Text(text.source, sequence_length=10)
    assert np.array_equal(evaluation_windows(checkpoint, by_default), [digits] * 3)
    with pytest.raises(CalibrationError, match="30 tokens, but 64 windows of 10 need 640"):
        calibration_windows(checkpoint, by_default)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (tokens(3, 5)[0], r"shape \(5,\)"),
        (tokens(3, 5).astype(float), "dtype float64"),
        (tokens(3, 1), r"shape \(3, 1\)"),
        (tokens(0, 5), r"shape \(0, 5\)"),
        (tokens(3, 5) - 260, "between 0 and 259"),
        (tokens(3, 5) + 260, "between 0 and 259"),
        (Text("/no/such/file", sequence_length=8), "cannot read /no/such/file: No such file"),
    ],
)
def test_what_makes_no_windows_is_refused(checkpoint, given, said):
    with pytest.raises(CalibrationError, match=said):
        calibration_windows(checkpoint, given)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"samples": 0}, "samples is"),
        ({"sequence_length": 1}, "sequence_length is"),
        ({"sampling": "best"}, "sampling 'best' is none of even, random, documents"),
        ({"source": []}, "the source of the text is empty"),
        ({"source": ["a.txt", ""]}, "the source of the text is empty"),
        ({"source": ["a.txt", "b.npy"]}, "b.npy cannot be joined"),
        ({"source": ["generate:3", "generate:4"]}, "generate:3 and generate:4: give generate"),
        ({"source": "generate:3", "samples": 4}, "other texts than generate:3: leave it out"),
        ({"source": "generate:many"}, "generate:many is not of the form generate:WINDOWS"),
    ],
)
def test_a_text_of_no_windows_is_refused(fields, said):
    with pytest.raises(CalibrationError, match=said):
        Text(**fields)


def test_documents_are_joined_by_the_token_that_ends_a_text(checkpoint, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abcd"}\n{"text": ""}\n{"text": "efgh"}\n')
    (tmp_path / "b.txt").write_text("ijkl")
    text = Text([tmp_path / "a.jsonl", tmp_path / "b.txt"], samples=2, sequence_length=7)
    end, tokenizer = checkpoint.config["eos_token_id"], byte_tokenizer()
    ids = [tokenize(tokenizer, each, 260).tolist() for each in ("abcd", "efgh", "ijkl")]
    joined = [*ids[0], end, *ids[1], end, *ids[2]]
    assert np.array_equal(calibration_windows(checkpoint, text), np.reshape(joined, (2, 7)))


def test_messages_have_one_start_token_in_each_window(chat_checkpoint, checkpoint, tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path.write_text(f"{json.dumps({'messages': turns})}\n" * 2)
    ids = tokenize(byte_tokenizer(), "[user]Hi[assistant]Ho", 260).tolist()
    one = Text(path, 2, 1 + len(ids), sampling="documents")
    assert calibration_windows(chat_checkpoint, one).tolist() == [[256, *ids]] * 2
    joined = Text(path, 1, 2 + 2 * len(ids))
    assert calibration_windows(chat_checkpoint, joined).tolist() == [[256, *ids, 257, *ids]]
    with pytest.raises(
        CalibrationError, match=r"^\S+a.jsonl, line 1: the chat template fails: .*; give records"
    ):
        calibration_windows(checkpoint, one)  # whose tokenizer has none


def test_samplings(checkpoint, tmp_path):
    digits = [str(i % 10) * (5 + i % 3) for i in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(f'{{"text": "{each}"}}' for each in digits))

    def windows(sampling, samples, length=6, seed=0):
        text = Text(path, samples, length, sampling=sampling, seed=seed)
        return calibration_windows(checkpoint, text)

    tokenizer = byte_tokenizer()
    long = [tokenize(tokenizer, each[:6], 260) for each in digits if len(each) >= 6]
    assert np.array_equal(windows("documents", 20), long)
    assert np.array_equal(windows("documents", 2), [long[0], long[-1]])
    with pytest.raises(CalibrationError, match="20 of 30 documents have 6 tokens or more, and 21"):
        windows("documents", 21)
    every = windows("even", 34).tolist()  # all that there are
    drawn = windows("random", 10).tolist()
    assert np.array_equal(windows("random", 10), drawn)
    assert windows("random", 10, seed=1).tolist() != drawn
    places = [every.index(window) for window in drawn]
    assert places == sorted(set(places))
    with pytest.raises(CalibrationError, match="209 tokens, but 35 windows of 6 need 210"):
        windows("random", 35)


def test_of_a_dataset_no_more_is_read_than_the_windows_need(checkpoint, monkeypatch):
    read = []

    def load_dataset(*place, **options):
        for i in range(100):
            read.append(i)
            yield {"text": "abc" if i % 2 else "abcdef"}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert calibration_windows(checkpoint, Text("hf:a/b", 3, 5)).shape == (3, 5)
    assert len(read) == 3
    assert calibration_windows(checkpoint, Text("hf:a/b", 3, 5, sampling="documents")).shape == (
        3,
        5,
    )
    assert len(read) == 3 + 5


def test_tokens_of_a_file(checkpoint, tmp_path):
    path, given = tmp_path / "a.npy", tokens(6, 5)
    np.save(path, given)
    assert np.array_equal(calibration_windows(checkpoint, Text(path)), given)
    assert np.array_equal(calibration_windows(checkpoint, Text(path, 2)), given[[0, 5]])
    assert np.array_equal(evaluation_windows(checkpoint, Text(path, 2)), given[:2])
    with pytest.raises(CalibrationError, match="has 6 windows, fewer than 7"):
        calibration_windows(checkpoint, Text(path, 7))
    path.write_text("a")
    with pytest.raises(CalibrationError, match=r"cannot read .*a.npy"):
        calibration_windows(checkpoint, Text(path))


def test_a_model_writes_from_its_start_token(chat_checkpoint):
    windows = calibration_windows(chat_checkpoint, Text(["generate:2"], sequence_length=4))
    assert windows[:, 0].tolist() == [256, 256]


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_windows_longer_than_the_positions_of_another_family_are_refused(name):
    other = types.SimpleNamespace(config={name: 8}, decoder=None)
    check_length(other, 8)
    with pytest.raises(CalibrationError, match="windows of 9 tokens are longer than the model's 8"):
        check_length(other, 9)


def test_a_recipe_that_does_not_fit_is_refused_before_the_model_writes(tmp_path, monkeypatch):
    write_tiny(tmp_path / "model")
    monkeypatch.setattr("prox24._jobs.text.generated_windows", None)
    text, recipe = Text("generate:3", sequence_length=8), Recipe(skip="nothing")
    with pytest.raises(RecipeError, match="skip 'nothing' is found in none of the 14 linears"):
        prune(tmp_path / "model", tmp_path / "out", recipe, calibration=text)
    with pytest.raises(Prox24Error, match="memory is too small"):
        prune(tmp_path / "model", tmp_path / "out", calibration=text, memory=1)
    recipe = Recipe(refine=BlockRefinement(held_out=1))
    with pytest.raises(CalibrationError, match="all 3 windows are held out"):
        prune(tmp_path / "model", tmp_path / "out", recipe, calibration=text)


def test_a_start_token_without_an_embedding_is_refused_before_the_model_writes(
    chat_checkpoint, monkeypatch
):
    monkeypatch.setitem(chat_checkpoint.config, "vocab_size", 256)
    with pytest.raises(CalibrationError, match="the tokenizer gives id 256 but the model has 256"):
        calibration_windows(chat_checkpoint, Text("generate:2", sequence_length=8))


def test_a_model_writes_its_own_windows(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(generated, "CACHE_BYTES", 2 * 8 * 512)  # two windows at once
    text = Text("generate:3", sequence_length=8)
    with caplog.at_level("INFO", logger="prox24"):
        windows = calibration_windows(checkpoint, text)
    said = [line.split(",")[0] for line in caplog.messages]
    assert said == ["write 1/2 windows.0", "write 2/2 windows.2"]
    assert windows.shape == (3, 8)
    assert set(windows[:, 0]) == {checkpoint.config["eos_token_id"]}
    assert len({tuple(window) for window in windows.tolist()}) == 3
    assert np.array_equal(calibration_windows(checkpoint, text), windows)
    other = calibration_windows(checkpoint, dataclasses.replace(text, seed=1))
    assert not np.array_equal(other, windows)
    with pytest.raises(CalibrationError, match="generate:3 is to calibrate on"):
        evaluation_windows(checkpoint, text)


def test_a_model_writes_more_windows_than_a_text_has(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 9)
    given = Text(tmp_path / "a.txt", samples=2, sequence_length=8)
    joined = dataclasses.replace(given, source=[tmp_path / "a.txt", "generate:3"])
    written = Text("generate:3", sequence_length=8)
    parts = [calibration_windows(checkpoint, text) for text in (given, written)]
    assert np.array_equal(calibration_windows(checkpoint, joined), np.concatenate(parts))
