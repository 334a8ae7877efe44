"""Windows of tokens from texts."""

import numpy as np
import pytest
from tiny import byte_tokenizer, tokens, write_tiny

from prox24 import Text
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._jobs.text import (
    calibration_windows,
    evaluation_windows,
    first_windows,
    spread_windows,
    start_tokens,
    tokenize,
)
from prox24.errors import CalibrationError

IDS = np.arange(103, dtype=np.int32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "model"
    write_tiny(folder)
    return open_checkpoint(folder)


def test_ids_without_an_embedding_are_refused():
    assert tokenize(byte_tokenizer(), "abc", 260).max() < 260
    with pytest.raises(CalibrationError, match=r"gives id \d+ but the model has 50 embeddings"):
        tokenize(byte_tokenizer(), "abc", 50)


def test_windows_do_not_overlap_and_say_what_is_missing():
    assert first_windows(IDS, None, 10).shape == (10, 10)
    assert spread_windows(IDS, 4, 10)[:, 0].tolist() == [0, 30, 60, 90]
    for windows in (first_windows, spread_windows):
        with pytest.raises(CalibrationError, match=r"103 tokens, but 11 windows of 10 need 110"):
            windows(IDS, 11, 10)
    with pytest.raises(CalibrationError, match="1 windows of 200 need 200"):
        first_windows(IDS, None, 200)


def test_every_window_begins_with_the_start_tokens_and_none_of_the_text_is_lost():
    windows = first_windows(IDS, None, 10, [7, 8])
    assert windows.shape == (12, 10)
    assert np.all(windows[:, :2] == [7, 8])
    assert windows[:, 2:].ravel().tolist() == list(range(96))
    assert np.array_equal(spread_windows(IDS, 12, 10, [7, 8]), windows)
    with pytest.raises(CalibrationError, match="windows of 2 have no room beside 2 start tokens"):
        first_windows(IDS, 1, 2, [7, 8])


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
    by_default = Text(text.file, sequence_length=10)
    assert np.array_equal(evaluation_windows(checkpoint, by_default), [digits] * 3)
    with pytest.raises(CalibrationError, match="30 tokens, but 64 windows of 10 need 640"):
        calibration_windows(checkpoint, by_default)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (tokens(3, 5)[0], r"tokens of shape \(5,\)"),
        (tokens(3, 5).astype(float), "dtype float64"),
        (tokens(3, 1), r"shape \(3, 1\)"),
        (tokens(3, 5) - 260, "between 0 and 259"),
        (tokens(3, 5) + 260, "between 0 and 259"),
        (Text("/no/such/file"), "cannot read /no/such/file: No such file"),
    ],
)
def test_what_makes_no_windows_is_refused(checkpoint, given, said):
    with pytest.raises(CalibrationError, match=said):
        calibration_windows(checkpoint, given)


@pytest.mark.parametrize("sizes", [{"samples": 0}, {"sequence_length": 1}])
def test_a_text_of_no_windows_is_refused(sizes):
    with pytest.raises(CalibrationError, match=f"{next(iter(sizes))} is"):
        Text(**sizes)
