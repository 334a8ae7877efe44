"""lm-evaluation-harness over prox24's forward pass, and what is said where it is not installed."""

import importlib
import json
import os
import re
import runpy
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from programs import ROOT
from tiny import LONG_ROPE, TEMPLATE, byte_tokenizer, chat_tokenizer, rounding, write_tiny

from prox24._models.generate import generate
from prox24.errors import CalibrationError, MissingPackageError, PromptError, Prox24Error

EMMA = "Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, "
PAIRS = [
    (EMMA[:40], " and"),
    ("", "Emma"),
    (EMMA[:9], "x"),
    (EMMA[:9], "y"),
    (EMMA[:30] + " ", "clever"),
    (EMMA[:14], EMMA[14:60]),
    ("</s>", "a"),
    (EMMA[:20], "and"),
]
# Frequencies change at a length that is no power of two.
SWITCH = {"original_max_position_embeddings": 24}
LONG = {"rope_parameters": LONG_ROPE | SWITCH, **SWITCH}


def write(folder, variant="llama1", **changes):
    """A tiny model whose tokenizer has a start and an end token, and its folder."""
    write_tiny(folder, variant, bos_token_id=256, eos_token_id=257, **changes)
    chat_tokenizer().save_pretrained(folder)
    return folder


def by_torch(folder, dtype="float32"):
    """The function from tokens to logits, in float32, of weights in a dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).float().eval()

    def logits(tokens):
        with torch.no_grad():
            return model(torch.as_tensor([tokens])).logits[0].numpy()

    return logits


@pytest.fixture(scope="module")
def harness():
    """Skips where lm_eval is not installed and need not be."""
    try:
        importlib.import_module("torch")
        return importlib.import_module("prox24.lm_eval")
    except ImportError as error:
        if "REQUIRE_LM_EVAL" in os.environ:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def logits(harness, folder):
    return by_torch(folder)


@pytest.fixture
def lm(harness, folder):
    return harness.Prox24LM(folder, batch_size=2)


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def expected_answer(logits, context, continuation):
    """By the logits of the text alone, without padding; in float64 from there."""
    logits = logits(context + continuation)[len(context) - 1 : -1].astype(np.float64)
    values = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    own = values[np.arange(len(continuation)), continuation]
    atol = 2 * len(own) * rounding(logits)
    return own.sum(), bool((values.argmax(axis=-1) == continuation).all()), atol


def assert_answers(found, logits, texts):
    assert len(found) == len(texts)
    for (value, greedy), (context, continuation) in zip(found, texts, strict=True):
        expected, most_probable, atol = expected_answer(logits, context, continuation)
        assert value == pytest.approx(expected, rel=0, abs=atol)
        assert greedy is most_probable


def ids(text):
    return byte_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize(
    ("variant", "batch_size"), [("llama1", "auto"), ("llama1", 3), ("phi3_long", 3), ("gpt2", 1)]
)
def test_answers_are_those_of_whole_texts_in_the_order_asked(
    harness, tmp_path, variant, batch_size
):
    changes = LONG if variant == "phi3_long" else {}
    folder = write(tmp_path / "model", variant, **changes)
    lm = harness.Prox24LM(str(folder), batch_size=batch_size)
    found = lm.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    # The space at the end of a context belongs to what comes; "</s>" is a token.
    texts = [(ids(context.rstrip()), ids(continuation)) for context, continuation in PAIRS]
    texts[1] = ([256], ids("Emma"))
    texts[4] = (ids(EMMA[:30]), ids(" clever"))
    texts[6] = ([257], ids("a"))
    assert_answers(found, by_torch(folder), texts)


def most_probable(logits, tokens, count):
    for _ in range(count):
        tokens = [*tokens, int(logits(tokens)[-1].argmax())]
    return tokens[-count:]


def test_a_continuation_is_greedy_if_all_of_its_tokens_are(lm, logits):
    tokens = ids(EMMA[:20])
    greedy = most_probable(logits, tokens, 3)
    other = [*greedy[:1], greedy[1] ^ 1, *greedy[2:]]
    requests = [(None, tokens, greedy), (None, tokens, other), (None, tokens, greedy[:2])]
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [flag for _, flag in found] == [True, False, True]
    assert_answers(found, logits, [request[1:] for request in requests])


def test_a_context_that_is_too_long_is_cut_at_its_start(harness, folder, logits):
    lm = harness.Prox24LM(folder, max_length=20)
    found = lm.loglikelihood(asked("loglikelihood", (EMMA[:50], " and")), disable_tqdm=True)
    # The last token is predicted, and is no input.
    assert_answers(found, logits, [(ids(EMMA[:50])[-17:], ids(" and"))])
    with pytest.raises(CalibrationError, match="of 30 tokens is longer than max_length, 20"):
        lm.loglikelihood(asked("loglikelihood", ("a", EMMA[:30])), disable_tqdm=True)


def generated(lm, *requests):
    return lm.generate_until(asked("generate_until", *requests), disable_tqdm=True)


def test_texts_go_on_by_the_most_probable_tokens_until_a_string(lm, logits):
    prompts = [EMMA[:20], "", EMMA[:33], EMMA[:21]]
    starts = [ids(prompt) or [256] for prompt in prompts]
    texts = [byte_tokenizer().decode(most_probable(logits, start, 12)) for start in starts]
    settings = {"until": ["@@"], "max_gen_toks": 12}
    assert generated(lm, *((prompt, settings) for prompt in prompts)) == texts
    stop = texts[2][4:6]
    (cut,) = generated(lm, (prompts[2], {"until": [stop, ""], "max_gen_toks": 12}))
    assert cut == texts[2].split(stop)[0]
    assert generated(lm, (prompts[2], {"until": [], "max_gen_toks": 0})) == [""]


def test_an_end_token_ends_a_text(harness, logits, tmp_path):
    end, *_ = most_probable(logits, ids(EMMA[:20]), 5)[-1:]
    folder = write(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    lm = harness.Prox24LM(folder)
    prompt = lm._prompt(EMMA[:20], {"max_gen_toks": 12})
    lm._go_on([prompt], *lm._caches(prompt))
    assert prompt.tokens[-1] == end
    assert len(prompt.tokens) < prompt.prompt + 12


def test_draws_differ_and_are_the_same_again(harness, folder):
    drawn = {"temperature": 1.0, "do_sample": True, "max_gen_toks": 8, "until": ["@@"]}
    request = (EMMA[:20], drawn | {"top_p": 0.9})
    found = generated(harness.Prox24LM(folder), request, request)
    assert found[0] != found[1]
    assert generated(harness.Prox24LM(folder), request, request) == found


def test_a_text_goes_on_where_frequencies_change(harness, tmp_path):
    lm = harness.Prox24LM(write(tmp_path / "model", "phi3_long", **LONG))
    tokens = ids(EMMA[:20])
    drawn = generate(lm.config, lm._weights, [tokens], 12)
    expected = byte_tokenizer().decode([int(token[0]) for token in drawn])
    assert generated(lm, (EMMA[:20], {"max_gen_toks": 12, "until": ["@@"]})) == [expected]


def test_weights_in_bfloat16_answer_in_float32(harness, folder):
    lm = harness.Prox24LM(folder, dtype="bfloat16")
    assert lm._weights.outer["norm.weight"].dtype == jnp.bfloat16
    found = lm.loglikelihood(asked("loglikelihood", PAIRS[0]), disable_tqdm=True)
    assert_answers(found, by_torch(folder, "bfloat16"), [tuple(map(ids, PAIRS[0]))])


def test_the_answers_are_those_of_the_harness_by_pytorch(harness, folder):
    if "REQUIRE_LM_EVAL" not in os.environ:
        pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.models import huggingface

    for longest in (None, 24):
        own = harness.Prox24LM(folder, max_length=longest)
        other = huggingface.HFLM(str(folder), device="cpu", dtype="float32", max_length=longest)
        pairs = [pair for pair in PAIRS if len(pair[1]) <= 24]
        found, expected = (
            lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
            for lm in (own, other)
        )
        assert [flag for _, flag in found] == [flag for _, flag in expected]
        atol = 50 * rounding(np.asarray([6.0]))
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
        found, expected = (
            lm.loglikelihood_rolling(asked("loglikelihood_rolling", (EMMA,), ("a",)), True)
            for lm in (own, other)
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * atol)
        settings = {"until": ["e"], "max_gen_toks": 10}
        requests = [(EMMA[:n], settings) for n in (5, 30, 60)]
        assert generated(own, *requests) == generated(other, *requests)


def test_tasks_of_local_files(lm, logits, tmp_path):
    from lm_eval import simple_evaluate

    rows = [
        {"text": EMMA[:n], "choices": ["a", "ich", " he"], "answer": n % 3} for n in (9, 30, 41)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
    }
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{text}}"}
    choice |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    choice |= {"task": "choice", "target_delimiter": ""}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "task": "rolling"}
    rolling |= {"doc_to_target": "{{text}}", "metric_list": [{"metric": "byte_perplexity"}]}
    found = simple_evaluate(lm, tasks=[shared | choice, shared | rolling], bootstrap_iters=0)
    right = [
        np.argmax([expected_answer(logits, ids(row["text"]), ids(c))[0] for c in row["choices"]])
        == row["answer"]
        for row in rows
    ]
    assert found["results"]["choice"]["acc,none"] == pytest.approx(np.mean(right))
    losses = [expected_answer(logits, [256], ids(row["text"])) for row in rows]
    size = sum(len(row["text"]) for row in rows)
    mean = -sum(value for value, _, _ in losses) / size
    loss = np.log(found["results"]["rolling"]["byte_perplexity,none"])
    assert loss == pytest.approx(mean, rel=0, abs=sum(atol for _, _, atol in losses) / size)


def test_the_harness_finds_the_model_by_name_beside_its_own(harness, folder):
    from lm_eval.api.registry import get_model

    lm = get_model("prox24").create_from_arg_string(f"pretrained={folder}", {"batch_size": 4})
    assert lm.batch_size == 4
    assert get_model("dummy") is not None


def test_a_conversation_is_written_by_the_chat_template(lm):
    written = lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert written == "[user]Hello"
    assert lm.chat_template(True) == TEMPLATE
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    lm.tokenizer.chat_template = refusing + TEMPLATE
    history = [{"role": role, "content": "Hello"} for role in ("system", "user")]
    assert lm.apply_chat_template(history) == written
    assert lm.tokenizer_name.endswith("tiny")
    assert "/" not in lm.tokenizer_name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0}, "batch_size 0 is neither a number of texts nor 'auto'"),
        ({"batch_size": "many"}, "batch_size 'many' is neither"),
        ({"max_length": 129}, "max_length 129 is not between 1 and 128"),
        ({"max_length": 0}, "max_length 0 is not between"),
        ({"dtype": "int8"}, "dtype 'int8' is none of float32, float16, bfloat16"),
        ({"device": "cuda:0"}, "device 'cuda:0': leave it out, JAX chooses it"),
    ],
)
def test_arguments_out_of_range_are_one_sentence(harness, folder, arguments, said):
    with pytest.raises(Prox24Error, match=said):
        harness.Prox24LM(folder, **arguments)


def test_a_context_without_tokens_is_the_prefix_and_an_empty_continuation_an_error(lm):
    found, expected = (
        lm._loglikelihood_tokens([(None, context, [70])], disable_tqdm=True)
        for context in ([], [lm.prefix_token_id])
    )
    assert found == expected
    with pytest.raises(CalibrationError, match="a continuation has no tokens"):
        lm._loglikelihood_tokens([(None, [70], [])], disable_tqdm=True)


def test_generation_that_is_impossible_is_one_sentence(lm):
    (text,) = generated(lm, ("a", {"num_beams": 1, "max_gen_toks": 2}))
    assert [text] == generated(lm, ("a", {"max_gen_toks": 2}))
    with pytest.raises(PromptError, match="does not generate with num_beams"):
        generated(lm, ("a", {"num_beams": 2}))
    with pytest.raises(PromptError, match="128 tokens to generate leave no room in 128"):
        generated(lm, ("a", {"max_gen_toks": 128}))


def test_a_tokenizer_that_does_not_fit_is_one_sentence(harness, tmp_path):
    write_tiny(tmp_path / "model", eos_token_id=None)
    lm = harness.Prox24LM(tmp_path / "model")
    with pytest.raises(PromptError, match="has no token for an empty context"):
        lm.loglikelihood(asked("loglikelihood", ("", "a")), disable_tqdm=True)
    folder = write(tmp_path / "small", vocab_size=200)
    with pytest.raises(CalibrationError, match="gives id 257 but the model has 200 embeddings"):
        harness.Prox24LM(folder).tok_encode("</s>")


def test_logits_that_are_nan_are_an_error(lm):
    lm._weights.outer["norm.weight"] = jnp.full(32, jnp.nan, jnp.float32)
    with pytest.raises(Prox24Error, match="logits are NaN"):
        lm.loglikelihood(asked("loglikelihood", ("a", "b")), disable_tqdm=True)
    with pytest.raises(Prox24Error, match="logits are NaN"):
        generated(lm, ("a", {"max_gen_toks": 2}))


def test_where_the_package_is_missing_the_import_says_what_to_install(monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == "lm_eval" or name == "prox24.lm_eval":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = r"prox24.lm_eval needs the package lm_eval: pip install 'prox24\[eval\]'"
    with pytest.raises(MissingPackageError, match=said):
        importlib.import_module("prox24.lm_eval")


def test_the_questions_of_the_whole_job(harness, folder, tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "whole_job.py"))
    example["write_texts"](tmp_path)
    first, second = example["ask"]([folder, folder], tmp_path, 5)
    assert first == second
    assert re.fullmatch(r"(0|20|40|60|80|100)\.0%", first)
