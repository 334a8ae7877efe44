"""Decoding with a cache against full passes, golden files and PyTorch; the drawing of tokens."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import run_process
from tiny import (
    VARIANTS,
    config_dict,
    jax_logits,
    model_weights,
    random_weights,
    tokens,
    write_folder,
    write_tiny,
)

from prox24.checkpoints.checkpoint import open_checkpoint, stop_tokens
from prox24.cli.main import main
from prox24.errors import CheckpointError, PromptError
from prox24.models import decoder
from prox24.models.generate import advance, choose, empty_cache, generate, step

GOLDEN = Path(__file__).parent / "golden"
PROMPT, LENGTH = 44, 48
# Other numbers of these do not matter to a cache.
LIKE_LLAMA1 = {"large_theta", "loose_norm", "linear_rope", "llama3_rope", "yarn_rope", "biases"}
CACHED = sorted(set(VARIANTS) - LIKE_LLAMA1)


def tiny_model(variant="llama1", **changes):
    config = config_dict(variant, **changes)
    return model_weights(config, random_weights(config))


def continued(model, prompts, count, **options):
    return np.stack(list(generate(*model, prompts, count, **options)), axis=1)


def greedy_by_full_passes(variant, text, first):
    """The most probable token behind each of the tokens of a text from a position on."""
    config = config_dict(variant)
    logits = jax_logits(config, random_weights(config), text)
    return logits[:, first:].argmax(-1)


@pytest.mark.parametrize("variant", CACHED)
def test_logits_with_a_cache_agree_with_golden_files(variant):
    config, weights = tiny_model(variant)
    config = decoder.at_length(config, LENGTH)
    ids, expected = tokens(), np.load(GOLDEN / f"{variant}.npy")
    cache = empty_cache(config, len(ids), LENGTH)
    logits, cache = advance(config, weights, cache, ids[:, :PROMPT], np.int32(0))
    for position in range(PROMPT, LENGTH):
        last = ids[:, position, None]
        logits, cache = step(config, weights, cache, last, np.int32(position))
        np.testing.assert_allclose(logits, expected[:, position - PROMPT], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", CACHED)
def test_greedy_tokens_are_those_of_full_passes(variant):
    prompts = tokens()[:, :PROMPT]
    generated = continued(tiny_model(variant), prompts, LENGTH - PROMPT + 1)
    text = np.concatenate([prompts, generated[:, :-1]], axis=1)
    np.testing.assert_array_equal(generated, greedy_by_full_passes(variant, text, PROMPT - 1))


def test_a_text_that_outgrows_the_short_frequencies_is_read_anew():
    # The switch is at 32 tokens: full passes up to there have other frequencies than beyond.
    prompts = tokens()[:, :31]
    generated = continued(tiny_model("phi3_long"), prompts, 4)
    text = np.concatenate([prompts, generated[:, :-1]], axis=1)
    expected = [
        greedy_by_full_passes("phi3_long", text[:, :32], 30),
        greedy_by_full_passes("phi3_long", text, 32),
    ]
    np.testing.assert_array_equal(generated, np.concatenate(expected, axis=1))


@pytest.mark.parametrize("variant", ["grouped_heads", "gemma3", "gpt2", "opt", "bloom", "mixtral"])
def test_greedy_tokens_are_those_of_pytorch(tmp_path, variant):
    make_golden = pytest.importorskip("make_golden", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    write_tiny(tmp_path / "model", variant)
    model = make_golden.torch_model(tmp_path / "model")
    model.generation_config.eos_token_id = None
    prompts = tokens()[:, :PROMPT]
    ids = torch.from_numpy(prompts).long()
    count = LENGTH - PROMPT + 1
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count
    )
    generated = continued(tiny_model(variant), prompts, count)
    np.testing.assert_array_equal(generated, expected[:, PROMPT:].numpy())


def test_equal_layers_are_traced_once_for_the_prompt_and_once_for_the_step(monkeypatch):
    traced = []

    def counted(spec, weights, hidden, *rest, layer=decoder.layer):
        traced.append(hidden.shape[1])
        return layer(spec, weights, hidden, *rest)

    monkeypatch.setattr(decoder, "layer", counted)
    model = tiny_model(intermediate_size=40)  # of no other test
    before = step._cache_size()
    for options in ({}, {"temperature": 0.7, "top_p": 0.9, "seed": 3}, {"temperature": 2.0}):
        assert continued(model, tokens()[:, :4], 6, **options).shape == (2, 6)
    assert traced == [4, 1]
    assert step._cache_size() - before == 1


def test_the_cache_is_donated():
    config, weights = tiny_model()
    cache = empty_cache(config, 2, LENGTH)
    step(config, weights, cache, tokens()[:, :1], np.int32(0))
    assert all(part.is_deleted() for part in jax.tree.leaves(cache))


def test_texts_of_a_batch_do_not_depend_on_each_other():
    model, prompts = tiny_model(), tokens()[:, :PROMPT]
    both = continued(model, prompts, LENGTH - PROMPT + 1)
    one = continued(model, prompts[1:], LENGTH - PROMPT + 1)
    np.testing.assert_array_equal(one, both[1:])


def test_weights_in_bfloat16_are_multiplied_in_float32():
    config, weights = tiny_model()
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    rounded = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    first, _ = advance(config, half, empty_cache(config, 2, 8), tokens()[:, :8], np.int32(0))
    second, _ = advance(config, rounded, empty_cache(config, 2, 8), tokens()[:, :8], np.int32(0))
    np.testing.assert_array_equal(first, second)


def test_a_text_ends_with_a_stop_token_and_repeats_it_until_all_have_ended():
    model, prompts = tiny_model(), tokens()[:, :PROMPT]
    free = continued(model, prompts, 5)
    assert free[0, 1] not in [*free[0, :1], *free[1]]
    stopped = continued(model, prompts, 5, stop=[free[0, 1]])
    np.testing.assert_array_equal(stopped[0], [free[0, 0], *[free[0, 1]] * 4])
    np.testing.assert_array_equal(stopped[1], free[1])
    alone = continued(model, prompts[:1], 5, stop=[free[0, 1]])
    np.testing.assert_array_equal(alone, free[:1, :2])


def test_a_seed_decides_what_is_drawn():
    model, prompts = tiny_model(), tokens()[:, :PROMPT]
    first, again, other = (
        continued(model, prompts, 5, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


def drawn_shares(temperature, top_p, count=20_000):
    logits = np.tile(np.log(PROBABILITIES).astype(np.float32), (count, 1))
    drawn = choose(logits, jax.random.key(24), temperature, top_p)
    return np.bincount(drawn, minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    expected /= expected.sum()
    shares = drawn_shares(temperature, 1.0)
    # Pearson's statistic: above 23.5 once in 10,000 seeds, with 4 degrees of freedom.
    assert 20_000 * np.sum((shares - expected) ** 2 / expected) < 23.5


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.5, [1, 3]), (0.7, [1, 3, 4]), (0.96, [0, 1, 2, 3, 4])]
)
def test_the_nucleus_has_the_fewest_tokens_that_reach_top_p(top_p, kept):
    expected = np.where(np.isin(np.arange(5), kept), PROBABILITIES, 0)
    shares = drawn_shares(1.0, top_p)
    assert np.flatnonzero(shares).tolist() == kept
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.02)


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_the_most_probable_token_is_chosen_at_the_lowest_temperatures(temperature):
    assert drawn_shares(temperature, 1.0, 100).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("prompts", "count", "named"),
    [
        (np.zeros((1, 0), np.int32), 1, "the prompt is empty"),
        (np.array([[3, 260]]), 1, "not among the 260 tokens"),
        (np.array([[3, -1]]), 1, "not among the 260 tokens"),
        (np.zeros((1, 100), np.int32), 29, "100 tokens and 29 to generate .* 128 positions"),
    ],
)
def test_prompts_that_a_model_cannot_go_on_from(prompts, count, named):
    with pytest.raises(PromptError, match=named):
        next(generate(*tiny_model(), prompts, count))


@pytest.mark.parametrize(
    ("count", "options"),
    [(0, {}), (1, {"temperature": -0.1}), (1, {"top_p": 0.0}), (1, {"top_p": 1.1})],
)
def test_numbers_out_of_range_raise(count, options):
    with pytest.raises(ValueError, match=r"fewer than one|negative|not above 0"):
        next(generate(*tiny_model(), tokens(), count, **options))


# The command


def test_the_command_as_a_process_agrees_with_the_function(tmp_path):
    write_tiny(tmp_path / "model", dtype="bfloat16")
    arguments = ["generate", tmp_path / "model", "--prompt", "Once", "--tokens", "5", "--json"]
    outcome = run_process(*arguments, "--dtype", "float32")
    assert outcome.returncode == 0, outcome.stderr
    printed = json.loads(outcome.stdout)
    checkpoint = open_checkpoint(tmp_path / "model")
    ids = checkpoint.load_tokenizer()("Once")["input_ids"]
    weights = {name: checkpoint.read(name).astype(np.float32) for name in checkpoint.tensors}
    model = model_weights(checkpoint.config, weights)
    assert printed["tokens"] == continued(model, [ids], 5)[0].tolist()
    assert printed["prompt_tokens"] == 4
    assert printed["seconds"] > 0
    assert printed["tokens_per_second"] > 0


def test_the_command_prints_the_prompt_and_what_follows(tmp_path, capsys):
    write_tiny(tmp_path / "model")
    arguments = ["generate", str(tmp_path / "model"), "--prompt", "Once", "--tokens", "3"]
    drawn = [*arguments, "--temperature", "0.8", "--top-p", "0.9", "--seed", "4"]
    assert main([*drawn, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(drawn) == 0
    assert capsys.readouterr().out == f"Once{printed['text']}\n"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ('{"eos_token_id": [5, 6]}', {"eos_token_id": 2}, [5, 6]),
        ('{"do_sample": false}', {"eos_token_id": 2}, [2]),
        (None, {"eos_token_id": [2, 3]}, [2, 3]),
        (None, {"eos_token_id": None}, []),
    ],
)
def test_stop_tokens_are_of_the_generation_config_or_else_of_the_config(
    tmp_path, generation, config, expected
):
    folder = tmp_path / "model"
    write_folder(folder, config_dict() | config, random_weights(config_dict()))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    assert stop_tokens(open_checkpoint(folder)) == expected


def test_stop_tokens_that_are_no_ids_are_refused(tmp_path):
    write_tiny(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="'</s>' is no id"):
        stop_tokens(open_checkpoint(tmp_path / "model"))


def test_the_command_ends_with_a_stop_token(tmp_path, capsys):
    write_tiny(tmp_path / "model")
    arguments = ["generate", str(tmp_path / "model"), "--prompt", "Once", "--json"]
    assert main([*arguments, "--tokens", "3"]) == 0
    free = json.loads(capsys.readouterr().out)["tokens"]
    ends = json.dumps({"eos_token_id": free[1]})
    (tmp_path / "model" / "generation_config.json").write_text(ends)
    assert main([*arguments, "--tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == free[:2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "word " * 30], "150 tokens and 64 to generate are more than the model's 128"),
    ],
)
def test_a_prompt_that_does_not_do_is_one_line(tmp_path, capsys, options, named):
    write_tiny(tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("prox24: error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err


def test_an_unsupported_model_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert main(["generate", str(tmp_path), "--prompt", "Once"]) == 2
    assert "'mamba' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--tokens", "0"), ("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "1.5")],
)
def test_bad_values_of_options_exit_2(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "model", "--prompt", "Once", option, value])
    assert option in capsys.readouterr().err
