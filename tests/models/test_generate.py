"""Decoding with a cache against full passes and golden files; the drawing of tokens."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import calibrated, error_line, printed_json, run, write_workspace
from tiers import rest
from tiny import (
    FIRST_OF_FAMILY,
    assert_close,
    config_dict,
    model_weights,
    random_weights,
    rounding,
    tokens,
    write_tiny,
)

from prox24._checkpoints.checkpoint import DTYPES, open_checkpoint, stop_tokens
from prox24._jobs.forward import all_weights, load_model
from prox24._models import decoder
from prox24._models.generate import advance, choose, empty_cache, generate
from prox24._models.spec import at_length, head_weight
from prox24.errors import CheckpointError, PromptError, Prox24Error

GOLDEN = Path(__file__).parents[1] / "golden"
ALL_BUT_GEMMA = sorted({*FIRST_OF_FAMILY.values(), "falcon_alibi"} - {"gemma3"})
PROMPT, LENGTH = 44, 48  # programs are shared by the tests of these lengths
COUNT = LENGTH - PROMPT + 1


def tiny_model(variant="llama1", **changes):
    config = config_dict(variant, **changes)
    return model_weights(config, random_weights(config))


def continued(model, prompts, count=COUNT, **options):
    return np.stack(list(generate(*model, prompts, count, **options)), axis=1)


@functools.partial(jax.jit, static_argnums=0)
def full_pass(config, weights, text):
    hidden = decoder.embed(config, weights.outer, text)
    for spec, own in zip(config.layers, weights.layers, strict=True):
        hidden = decoder.layer(spec, own, hidden, decoder.no_tap)
    return decoder.logits(config, weights.outer, hidden)


@pytest.mark.parametrize("variant", ["gemma3", *rest(*ALL_BUT_GEMMA)])
def test_logits_token_by_token_are_those_of_full_passes_in_pytorch(variant):
    config, weights = tiny_model(variant)
    expected = np.load(GOLDEN / f"{variant}.npy")
    config, cache = at_length(config, LENGTH), empty_cache(config, 2, LENGTH)
    logits = []
    for position, last in enumerate(tokens().T):
        found, cache = advance(config, weights, cache, last[:, None], np.int32(position))
        logits.append(found)
    logits = np.stack(logits[-4:], axis=1)
    assert_close(logits, expected)


@pytest.mark.parametrize("variant", ["grouped_heads", "gpt2", *rest("gemma3", "bloom")])
def test_greedy_tokens_are_those_of_full_passes(variant):
    model, prompts = tiny_model(variant), tokens()[:, :PROMPT]
    generated = continued(model, prompts)
    text = np.concatenate([prompts, generated[:, :-1]], axis=1)
    expected = np.asarray(full_pass(*model, text)).argmax(-1)
    np.testing.assert_array_equal(generated, expected[:, PROMPT - 1 :])


def test_a_text_that_outgrows_the_short_frequencies_is_read_anew():
    model, prompts = tiny_model("phi3_long", num_hidden_layers=1), tokens()[:, :31]
    assert model[0].layers[0].attention.rope.switch == 32
    generated = continued(model, prompts, 4)
    text = np.concatenate([prompts, generated[:, :-1]], axis=1)
    # Full passes up to the switch have other frequencies than those beyond it.
    short, long = (np.asarray(full_pass(*model, text[:, :end])) for end in (32, 34))
    expected = np.concatenate([short[:, 30:], long[:, 32:]], axis=1)
    assert np.abs(long[:, 31] - short[:, 31]).max() > 100 * rounding(short)
    np.testing.assert_array_equal(generated, expected.argmax(-1))


def test_equal_layers_are_compiled_once_for_the_prompt_and_once_for_all_tokens(monkeypatch):
    traced = []

    def counted(spec, weights, hidden, *rest, layer=decoder.layer):
        traced.append(hidden.shape[1])
        return layer(spec, weights, hidden, *rest)

    monkeypatch.setattr(decoder, "layer", counted)
    model = tiny_model(intermediate_size=40)  # of no other test
    for options in ({}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}, {"temperature": 2.0}):
        assert continued(model, tokens()[:, :4], 6, **options).shape == (2, 6)
    assert traced == [4, 1]


def test_a_token_can_be_one_program_and_the_cache_is_donated():
    (config, weights), ids = tiny_model(num_hidden_layers=1), tokens()[:, :1]
    one_program = jax.jit(advance, static_argnums=0, donate_argnums=2)
    caches = [empty_cache(config, 2, LENGTH) for _ in range(2)]
    found, expected = (
        run(config, weights, cache, ids, np.int32(0))
        for run, cache in zip((one_program, advance), caches, strict=True)
    )
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_close(one, other, layers=1)
    assert all(part.is_deleted() for part in jax.tree.leaves(caches))


def test_weights_in_bfloat16_are_multiplied_in_float32():
    x, weight = jax.random.normal(jax.random.key(0), (2, 1, 3, 8), jnp.float32)
    half = weight[0].astype(jnp.bfloat16)
    product = decoder.linear(x, half)
    assert product.dtype == jnp.float32
    np.testing.assert_array_equal(product, decoder.linear(x, half.astype(jnp.float32)))


def test_a_text_ends_with_a_stop_token_and_repeats_it_until_all_have_ended():
    model, prompts = tiny_model(), tokens()[:, :PROMPT]
    free = continued(model, prompts, temperature=1.0)
    assert len({*free[0, :2].tolist(), *free[1].tolist()}) == 2 + COUNT
    stopped = continued(model, prompts, temperature=1.0, stop=[free[0, 1]])
    np.testing.assert_array_equal(stopped[0], [free[0, 0], *[free[0, 1]] * (COUNT - 1)])
    np.testing.assert_array_equal(stopped[1], free[1])
    both = continued(model, prompts, temperature=1.0, stop=[free[0, 1], free[1, 2]])
    np.testing.assert_array_equal(both[:, 1:], [[free[0, 1]] * 2, free[1, 1:3]])


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


def drawn_shares(temperature, top_p, count=20_000):
    logits = np.tile(np.log(PROBABILITIES).astype(np.float32), (count, 1))
    drawn = choose(logits, jax.random.key(24), temperature, top_p)
    return np.bincount(drawn, minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    expected /= expected.sum()
    shares = drawn_shares(temperature, 1.0)
    # Pearson's statistic: above 23.5 once in 10,000 seeds, with 4 degrees of freedom.
    assert 20_000 * np.sum((shares - expected) ** 2 / expected) < 23.5


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-50, [1]), (0.3, [1]), (0.7, [1, 3, 4]), (0.96, [0, 1, 2, 3, 4])]
)
def test_the_nucleus_has_the_fewest_tokens_that_reach_top_p(top_p, kept):
    expected = np.where(np.isin(np.arange(5), kept), PROBABILITIES, 0)
    shares = drawn_shares(1.0, top_p)
    assert np.flatnonzero(shares).tolist() == kept
    # The standard deviation of a share is at most 1/2 over the root of the draws; five of them.
    atol = 5 * 0.5 / np.sqrt(20_000)
    np.testing.assert_allclose(shares, expected / expected.sum(), rtol=0, atol=atol)


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_the_most_probable_token_is_chosen_at_the_lowest_temperatures(temperature):
    assert drawn_shares(temperature, 1.0, 100).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("prompts", "count", "named"),
    [
        (np.zeros((1, 0), np.int32), 1, "the prompt is empty"),
        (np.zeros(3, np.int32), 1, r"prompts of shape \(3,\)"),
        (np.array([[3, 260]]), 1, "not among the 260 tokens"),
        (np.array([[3, -1]]), 1, "not among the 260 tokens"),
        (np.array([[3, 2**32 + 5]]), 1, "not among the 260 tokens"),
        (np.array([[3, 1.7]]), 1, "ids are float64, not integers"),
        (np.zeros((1, 100), np.int32), 29, "100 tokens and 29 to generate .* 128 positions"),
    ],
)
def test_prompts_that_a_model_cannot_go_on_from(prompts, count, named):
    with pytest.raises(PromptError, match=named):
        next(generate(*tiny_model(), prompts, count))


def test_what_overflows_gives_no_token():
    config, weights = tiny_model()
    head = head_weight(config.head)
    broken = weights._replace(outer={**weights.outer, head: weights.outer[head].at[7].set(jnp.nan)})
    with pytest.raises(Prox24Error, match="logits after 48 tokens are NaN"):
        next(generate(config, broken, tokens(), 1))


@pytest.mark.parametrize(
    ("count", "options"),
    [(0, {}), (1, {"temperature": -0.1}), (1, {"top_p": 0.0}), (1, {"top_p": 1.1})],
)
def test_numbers_out_of_range_raise(count, options):
    with pytest.raises(ValueError, match=r"fewer than one|negative|not above 0"):
        next(generate(*tiny_model(), tokens(), count, **options))


# The command


TEXT = "It is a truth universally acknowledged, that"
assert len(TEXT) == PROMPT  # of bytes


@pytest.fixture
def folder(tmp_path):
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def command(folder, *options, prompt=TEXT, count=COUNT):
    return ["generate", folder, "--prompt", prompt, "--tokens", count, *options]


def test_the_command_agrees_with_the_function_and_prints_the_prompt_before(folder, capsys):
    printed = printed_json(capsys, *command(folder))
    tokenizer = open_checkpoint(folder).load_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert printed["tokens"] == continued(tiny_model(), [ids])[0].tolist()
    assert printed["text"] == tokenizer.decode(ids + printed["tokens"])[PROMPT:]
    assert printed["prompt_tokens"] == PROMPT
    assert printed["seconds"] > 0
    assert printed["tokens_per_second"] > 0
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 4}
    given = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "4"]
    (drawn,) = continued(tiny_model(), [ids], **options)
    assert run(*command(folder, *given)) == 0
    assert capsys.readouterr().out == f"{tokenizer.decode([*ids, *drawn.tolist()])}\n"


def test_the_weights_have_the_dtype_that_is_asked_for(folder):
    model = load_model(open_checkpoint(folder))
    for given, expected in ((None, "float32"), (DTYPES["bfloat16"], "bfloat16")):
        leaves = jax.tree.leaves(all_weights(model, given))
        assert {str(leaf.dtype) for leaf in leaves} == {expected}


def test_the_command_ends_with_a_stop_token(folder, capsys):
    generate = command(folder, "--temperature", "1")
    free = printed_json(capsys, *generate)["tokens"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": free[1]}))
    assert printed_json(capsys, *generate)["tokens"] == free[:2]


STOPS = [
    ('{"eos_token_id": [5, 6]}', {"eos_token_id": 2}, [5, 6]),
    ('{"do_sample": false}', {"eos_token_id": 2}, [2]),
    (None, {"eos_token_id": [2, 3]}, [2, 3]),
    (None, {"eos_token_id": None}, []),
]


@pytest.mark.parametrize(("generation", "config", "expected"), STOPS)
def test_stop_tokens_are_of_the_generation_config_or_else_of_the_config(
    folder, generation, config, expected
):
    (folder / "config.json").write_text(json.dumps(config_dict() | config))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    assert stop_tokens(open_checkpoint(folder)) == expected


def test_stop_tokens_that_are_no_ids_are_refused(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="'</s>' is no id"):
        stop_tokens(open_checkpoint(folder))


@pytest.mark.slow  # beside the products of tests/packed
def test_a_packed_model_goes_on_as_the_dense_one(tmp_path, capsys):
    write_workspace(tmp_path)
    options = [*calibrated(tmp_path, 4), "--method", "wanda", "--quiet"]
    assert run("prune", tmp_path / "model", tmp_path / "pruned", *options) == 0

    def generate(folder, *more):
        jax.clear_caches()
        return command(tmp_path / folder, *more, prompt="Once", count=6)

    dense = printed_json(capsys, *generate("pruned"))["tokens"]
    assert printed_json(capsys, *generate("pruned", "--packed"))["tokens"] == dense
    refused = error_line(capsys, *generate("model", "--packed", "--quiet"))
    assert "tensor model.layers.0.self_attn.q_proj.weight: w is not 2:4" in refused
