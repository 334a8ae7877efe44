"""Training the kept weights of a whole model on the dense model's predictions."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import config_dict, random_weights, tokens, write_folder, write_tiny

import prox24
from prox24 import refine
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._cli.main import main
from prox24._core.precision import COMPUTE_DTYPES
from prox24._jobs.forward import embedding_weights, head_weights, layer_weights, load_model
from prox24._jobs.text import shuffled
from prox24._jobs.training import _functions, _outer, _targets, train_checkpoint
from prox24._models import decoder, spec, stacks
from prox24.refine import BlockRefinement, ModelRefinement

VOCABULARY, WIDTH, LENGTH = 24, 16, 150
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
TEXT = "Calibration text for a model that reads bytes. " * 60


pytestmark = pytest.mark.usefixtures("standard_promotion")


def features(params, outer, ids):
    return jnp.tanh(outer["embedding"][ids] @ params["kernel"])


def logits(outer, hidden):
    return 4 * hidden @ outer["embedding"].T


@pytest.fixture
def student():
    """A dense and a pruned model, what both share, windows, and the dense one's features."""
    keys = jax.random.split(jax.random.key(0), 3)
    outer = {"embedding": jax.random.normal(keys[0], (VOCABULARY, WIDTH), jnp.float32)}
    dense = {"kernel": jax.random.normal(keys[1], (WIDTH, WIDTH), jnp.float32) / 4}
    mask = prox24.top_mask(jnp.abs(dense["kernel"]), axis=0)
    pruned = {"kernel": jnp.where(mask, dense["kernel"], 0)}
    ids = list(jax.random.randint(keys[2], (6, 2, LENGTH), 0, VOCABULARY, "int32"))
    return dense, pruned, outer, ids, [features(dense, outer, batch) for batch in ids]


def distil(student, optimizer, logits=logits, **more):
    """The pruned model, trained on the dense one's predictions."""
    _, pruned, outer, ids, targets = student
    return refine.train_model(features, logits, pruned, outer, ids, targets, optimizer, **more)


def expected_loss(params, outer, teacher, ids, target, share):
    """By the definition, in float64."""
    table, head = (np.asarray(part["embedding"], np.float64) for part in (outer, teacher))
    hidden = np.tanh(table[ids] @ np.asarray(params["kernel"], np.float64))

    def log_probabilities(hidden, head):
        scores = 4 * np.asarray(hidden, np.float64) @ head.T
        return scores - np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))

    own, dense = log_probabilities(hidden, table), log_probabilities(target, head)
    gap = np.mean(np.sum(np.exp(dense) * (dense - own), axis=-1))
    next_ids = np.asarray(ids)[:, 1:, None]
    entropy = -np.mean(np.take_along_axis(own[:, :-1], next_ids, axis=-1))
    return (1 - share) * gap + share * entropy


@pytest.mark.parametrize(("share", "other_head"), [(0.0, False), (0.3, True), (1.0, False)])
def test_the_loss_is_what_is_defined(student, share, other_head):
    _, pruned, outer, ids, targets = student
    teacher = jax.tree.map(lambda table: table[::-1] / 2, outer) if other_head else None
    refined = distil(student, optax.sgd(0.0), teacher=teacher, cross_entropy=share)
    expected = expected_loss(pruned, outer, teacher or outer, ids[-1], targets[-1], share)
    np.testing.assert_allclose(refined.losses, expected, rtol=1e-5)


def test_without_a_share_the_text_may_hold_what_is_excluded(student):
    excluded = student[3][0][0, 1]

    def excluding(outer, hidden):
        return logits(outer, hidden).at[..., excluded].set(-jnp.inf)

    refined = distil(student, optax.adam(0.01), excluding, passes=2)
    assert refined.outcome is refine.Outcome.IMPROVED


def test_the_text_alone_needs_no_teacher(student):
    *others, targets = student
    unknown = (*others, [jnp.full_like(target, jnp.nan) for target in targets])
    refined, expected = (
        distil(given, optax.adam(0.01), passes=2, cross_entropy=1.0) for given in (unknown, student)
    )
    assert refined.losses == expected.losses
    assert refined.outcome is refine.Outcome.IMPROVED


def test_a_window_of_one_token_has_no_next_one(student):
    *others, ids, targets = student
    short = (*others, [x[:, :1] for x in ids], [target[:, :1] for target in targets])
    refined = distil(short, optax.adam(0.01), passes=2, cross_entropy=0.3)
    assert np.all(np.isfinite(refined.losses))


def test_the_loss_falls_and_the_zeros_stay(student):
    refined = distil(student, optax.adam(0.01), passes=12)
    assert refined.outcome is refine.Outcome.IMPROVED
    assert refined.losses[-1] < 0.6 * refined.losses[0]
    np.testing.assert_array_equal(refined.params["kernel"] == 0, student[1]["kernel"] == 0)


def test_a_training_goes_on_with_the_same_bits(student):
    states = []

    def run(**more):
        optimizer = optax.adam(optax.cosine_decay_schedule(0.01, 10))
        return distil(student, optimizer, passes=2, measured_every=3, **more)

    def restored(state):
        losses = [float(loss) for loss in state.losses]
        return jax.tree.map(jnp.asarray, state)._replace(losses=losses, steps=int(state.steps))

    whole_run = run(on_measured=lambda state: states.append(jax.tree.map(np.array, state)))
    assert [int(state.steps) for state in states] == [3, 6, 9, 10]
    for state in states[:3]:
        again = run(resume=lambda begun, state=state: restored(state))
        np.testing.assert_array_equal(again.params["kernel"], whole_run.params["kernel"])
        assert again.losses == whole_run.losses


def test_unequal_batches_and_a_share_beyond_one_are_refused(student):
    *others, targets = student
    with pytest.raises(ValueError, match="6 batches of tokens, but 5 of targets"):
        distil((*others, targets[1:]), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"a share of cross-entropy of 1.5 is not from 0 to 1"):
        distil(student, optax.sgd(0.1), cross_entropy=1.5)


def exact_hidden(model, ids):
    """The last layer's output, layer by layer."""
    hidden = decoder.embed(model.config, embedding_weights(model), jnp.asarray(ids))
    for index, layer in enumerate(model.config.layers):
        hidden = decoder.layer(layer, layer_weights(model, index), hidden, decoder.no_tap)
    return hidden


def stacked(model):
    def tensor(index, name):
        return layer_weights(model, index)[name]

    return stacks.stacked(model.config, tensor, lambda name, tensors: jnp.stack(tensors))


@pytest.mark.parametrize("variant", ["llama1", "gpt2"])
def test_the_whole_model_is_its_layers(tmp_path, variant):
    write_tiny(tmp_path / "model", variant)
    model, ids = load_model(open_checkpoint(tmp_path / "model")), jnp.asarray(tokens(2, 24))
    params, outer = stacked(model), embedding_weights(model) | head_weights(model)
    found = stacks.features(model.config, params, outer, ids)
    np.testing.assert_allclose(found, exact_hidden(model, ids), rtol=1e-5, atol=1e-5)
    for index, back in enumerate(stacks.unstacked(model.config, params)):
        jax.tree.map(np.testing.assert_array_equal, layer_weights(model, index), back)


def test_linears_and_head_multiply_in_bfloat16_and_little_is_lost(tmp_path):
    write_tiny(tmp_path / "model", "mixtral")
    model = load_model(open_checkpoint(tmp_path / "model"))
    params, ids = stacked(model), jnp.asarray(tokens(batch=2, length=24))
    gradients, products = [], []
    for dtype in COMPUTE_DTYPES:
        features, logits = _functions(model.config, None, dtype)
        outer = _outer(model, None, dtype)

        def loss(params, features=features, logits=logits, outer=outer):
            return jnp.mean(logits(outer, features(params, outer, ids)) ** 2)

        gradient = jax.jit(jax.grad(loss))
        gradients.append(gradient(params))
        lowered = gradient.lower(params).as_text()
        of_bfloat16 = r"dot_general.*\(tensor<\S+xbf16>, tensor<\S+xbf16>\) -> tensor<\S+xf32>"
        products.append(len(re.findall(of_bfloat16, lowered)))
        assert not re.findall(r"dot_general.*-> tensor<\S+xbf16>", lowered)
    # Of every linear one forwards and two backwards, of the head one forwards and one backwards.
    assert products[0] == 0
    assert products[1] >= 3 * len(spec.linear_inputs(model.config.layers[0])) + 2
    for exact, found in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, atol=0.03 * np.max(np.abs(exact)))
        assert np.any(found != exact)


def command(*arguments):
    """The exit status."""
    return main([*map(str, arguments), "--quiet"])


def prune(folder, destination, *more):
    options = ["--method", "wanda", "--sequence-length", 32, "--samples", 8, *more]
    options += ["--calibration", folder / "text.txt"]
    return command("prune", folder / "model", folder / destination, *options)


@pytest.fixture
def workspace(tmp_path):
    write_tiny(tmp_path / "model", dtype="bfloat16")
    (tmp_path / "text.txt").write_text(TEXT)
    assert prune(tmp_path, "pruned") == 0
    return tmp_path


def distilled(workspace, destination="out", *more, models=("model", "pruned")):
    places = [workspace / name for name in (*models, destination)]
    options = ["--text", workspace / "text.txt", "--sequence-length", 32, "--samples", 16]
    return command("distill", *places, *options, "--rate", "0.003", *more)


@pytest.fixture
def refused(workspace, capsys):
    """What the command prints that is refused, in one line."""

    def line(*more, destination="out", **models):
        capsys.readouterr()
        assert distilled(workspace, destination, *more, **models) == 2
        (found,) = capsys.readouterr().err.strip().splitlines()
        assert not (workspace / destination).exists()
        return found

    return line


@pytest.fixture
def untrained(monkeypatch):
    """Fails where a model is trained."""
    monkeypatch.setattr("prox24._jobs.distill.train_checkpoint", None)


def test_the_command_trains_every_tensor_of_the_layers(workspace, capsys):
    assert distilled(workspace, "out", "--passes", 3, "--step-windows", 2, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["outcome"] == "improved"
    assert min(report["losses"]) < 0.9 * report["losses"][0]
    assert (report["steps"], report["tokens"]) == (3 * 7, 3 * 7 * 2 * 32)
    assert command("verify", workspace / "out", "--source", workspace / "model", "--json") == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["problems"] == {}
    assert any("norm" in name for name in verified["refined"])
    before, after = open_checkpoint(workspace / "pruned"), open_checkpoint(workspace / "out")
    for name in before.tensors:
        old, new = before.read(name), after.read(name)
        assert new.dtype == old.dtype
        assert np.any(new != old) == (".layers." in name), name
        assert "proj" not in name or np.array_equal(new == 0, old == 0)


def test_the_rate_rises_and_falls():
    rate = ModelRefinement(rate=0.5, warmup=0.25).schedule(40)
    rates = np.array([rate(step) for step in range(41)])
    assert rates[0] == pytest.approx(0.05)
    np.testing.assert_allclose(np.diff(rates[:11]), 0.045, rtol=1e-5)
    assert rates[10] == rates.max() == pytest.approx(0.5)
    assert np.all(np.diff(rates[10:]) < 0)
    assert rates[-1] == pytest.approx(0)
    for warmup, steps in ((0.0, 1), (1.0, 1), (1.0, 3), (0.1, 2)):
        rate = ModelRefinement(rate=0.5, warmup=warmup).schedule(steps)
        assert max(float(rate(step)) for step in range(steps)) == pytest.approx(0.5)


def test_gradients_are_cut_to_norm_one():
    refinement = ModelRefinement(rate=0.1, warmup=0.0)
    optimizer, plain = refinement.optimizer(100), optax.adam(refinement.schedule(100))
    params = jnp.zeros(4)
    state, expected = optimizer.init(params), plain.init(params)
    for size in (10.0, 0.1, 3.0):
        gradient = jnp.array([1.0, -2.0, 2.0, 4.0]) / 5 * size
        update, state = optimizer.update(gradient, state, params)
        wanted, expected = plain.update(gradient / max(1.0, size), expected, params)
        np.testing.assert_allclose(update, wanted, rtol=1e-5)


def test_windows_of_a_step_are_computed_in_parts(workspace, capsys):
    losses = []
    for parts, *more in ((1,), (4,), (4, "--warmup", 1)):
        step = ["--step-windows", 4, "--micro-batches", parts, *more]
        assert distilled(workspace, "out", *step, "--json", "--overwrite") == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["steps"], report["tokens"]) == (3, 3 * 4 * 32)
        losses.append(report["losses"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    assert losses[1][1:] != losses[2][1:]


def test_the_dense_model_multiplies_in_the_same_dtype(workspace):
    model = load_model(open_checkpoint(workspace / "model"))
    windows = np.asarray(tokens(batch=4, length=24))
    exact, rounded = (_targets(model, windows, 2, dtype) for dtype in COMPUTE_DTYPES)
    expected = exact_hidden(model, windows)
    np.testing.assert_allclose(np.concatenate(exact), expected, rtol=1e-5, atol=1e-5)
    error = np.concatenate(rounded) - expected
    assert 0 < np.max(np.abs(error)) < 0.03 * np.max(np.abs(expected))


def test_the_dense_model_predicts_by_its_own_head(workspace, capsys):
    weights = random_weights(config_dict())
    write_folder(workspace / "dense", config_dict(), weights)
    weights["lm_head.weight"] = np.zeros_like(weights["lm_head.weight"])
    weights[Q_PROJ][0, 0] = 0
    write_folder(workspace / "student", config_dict(), weights)
    assert distilled(workspace, "out", "--json", models=("dense", "student")) == 0
    # Of the student all tokens are as probable, whatever it computes.
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert losses[0] > 0.01
    assert losses == pytest.approx([losses[0]] * len(losses))


def test_models_and_options_that_do_not_fit_are_refused(workspace, refused):
    weights = random_weights(config_dict())
    weights[Q_PROJ][0, 0] = 0  # as float16 has them
    write_folder(workspace / "dense", config_dict(), weights)
    write_tiny(workspace / "other", "grouped_heads")
    assert "dense has no more zeros in its linears than" in refused(models=("dense", "dense"))
    assert "are not the same model" in refused(models=("other", "pruned"))
    devices = "64 devices are to share heads and widths, and a process has 1"
    assert devices in refused("--tensor-parallel", 64)
    assert "16 windows are too few for steps of 9" in refused("--step-windows", 9)
    assert "all 16 windows are held out" in refused("--held-out", 1.0)
    parts = refused("--step-windows", 4, "--micro-batches", 3)
    assert "3 micro-batches do not divide 4 windows of a step" in parts
    report = workspace / "no" / "report.json"
    assert f"the folder of {report} does not exist" in refused("--report", report)


def test_a_model_with_a_tenth_of_zeros_keeps_them(workspace):
    assert prune(workspace, "few", "--pattern", "10%") == 0
    assert distilled(workspace, models=("model", "few")) == 0
    trained, given = (open_checkpoint(workspace / name).read(Q_PROJ) for name in ("out", "few"))
    np.testing.assert_array_equal(trained == 0, given == 0)


def test_windows_are_taken_in_an_order_of_their_own():
    windows = np.arange(40).reshape(20, 2)
    found = shuffled(windows)
    assert found.tolist() == shuffled(windows).tolist() != windows.tolist()
    assert sorted(found.tolist()) == windows.tolist()


def test_an_interrupted_command_goes_on_with_the_same_bytes(
    workspace, monkeypatch, capsys, refused
):
    more = ["--compute-dtype", "bfloat16", "--measurements", 3]
    more += ["--step-windows", 2, "--micro-batches", 2]
    assert distilled(workspace, "whole", *more) == 0
    given, more = train_checkpoint, [*more, "--state", workspace / "state"]

    def interrupted(*arguments, on_measured, **keywords):
        def measured(state):
            on_measured(state)
            if len(state.losses) == 3:
                raise KeyboardInterrupt

        return given(*arguments, on_measured=measured, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("prox24._jobs.distill.train_checkpoint", interrupted)
        assert distilled(workspace, "out", *more) == 130
        # It is refused before any work.
        patch.setattr("prox24._jobs.distill.train_checkpoint", None)
        assert "refinement.passes was 1, is 2" in refused(*more, "--passes", 2)
    capsys.readouterr()
    assert distilled(workspace, "out", *more, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["resumed_steps"] < report["steps"]
    assert "no runtime skips them" in report["remark"]
    for path in (workspace / "whole").iterdir():
        assert path.read_bytes() == (workspace / "out" / path.name).read_bytes(), path.name


def test_a_state_that_cannot_be_written_is_one_line(workspace, monkeypatch, refused):
    def full(*arguments, **keywords):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    state = workspace / "state"
    said = f"cannot write the state in {state}: RESOURCE_EXHAUSTED"
    assert said in refused("--state", state)


def test_a_place_for_states_that_does_not_do_is_found_before_the_training(
    workspace, untrained, refused
):
    (workspace / "file").write_text("")
    for place, said in (
        ("file", f"cannot write {workspace / 'file'}: "),
        ("out/state", "out is or holds"),
        ("out.unfinished/state", "is made, is or holds"),
    ):
        assert said in refused("--state", workspace / place)
    assert not (workspace / "out.unfinished").exists()


@pytest.mark.parametrize(("damaged", "left"), [("arrays", ""), ("about", "{}")])
def test_a_state_that_cannot_be_read_is_named(workspace, refused, damaged, left):
    state = workspace / "state"
    assert distilled(workspace, "out", "--state", state) == 0
    for path in state.glob(f"*/{damaged}/**/*"):
        if path.is_file():
            path.write_text(left)
    said = refused("--state", state, destination="again")
    assert f"the state in {state} cannot be read" in said


@pytest.mark.parametrize(
    ("makes", "name", "value", "said"),
    [
        ([ModelRefinement], "measurements", 0, "is not positive"),
        ([ModelRefinement], "warmup", 1.5, "is not from 0 to 1"),
        ([ModelRefinement, BlockRefinement], "rate", np.nan, "is not positive"),
        ([ModelRefinement, BlockRefinement], "held_out", np.nan, "is not from 0 to 1"),
        ([ModelRefinement, BlockRefinement], "compute_dtype", "float16", "is none of float32, bf"),
    ],
)
def test_settings_that_do_not_train_are_refused(makes, name, value, said):
    for make in makes:
        with pytest.raises(ValueError, match=f"{name} {value} {said}"):
            make(**{name: value})


def test_a_training_that_diverges_is_reported_as_json(workspace, capsys):
    assert distilled(workspace, "out", "--rate", "1e15", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["outcome"], report["losses"][-1]) == ("diverged", None)
    assert command("verify", workspace / "out") == 0


def test_the_destination_is_looked_at_before_the_training(workspace, untrained, refused):
    folder = workspace / "out.unfinished"
    (folder / "model").mkdir(parents=True)
    job = {"versions": {"prox24": prox24.__version__}}
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "journal.jsonl").write_text('{"tensor": "a", "sha256": ""}\n')
    assert "holds 1 tensors of another run: of another command; run as before" in refused()
