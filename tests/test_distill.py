"""Training the kept weights of a whole model on the dense model's predictions."""

import json
import re
import shutil

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
from prox24._models import decoder, spec, whole
from prox24.errors import CalibrationError
from prox24.refine import BlockRefinement, ModelRefinement

VOCABULARY, WIDTH, LENGTH = 24, 16, 150
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
TEXT = "Calibration text for a model that reads bytes. " * 60


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's optimizers mix dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


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


def distil(student, optimizer, **more):
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
    _, pruned, outer, ids, targets = student

    def excluding(outer, hidden):
        return logits(outer, hidden).at[..., ids[0][0, 1]].set(-jnp.inf)

    refined = refine.train_model(
        features, excluding, pruned, outer, ids, targets, optax.adam(0.01), passes=2
    )
    assert refined.outcome is refine.Outcome.IMPROVED


def test_the_text_alone_needs_no_teacher(student):
    *others, targets = student
    unknown = (*others, [jnp.full_like(target, jnp.nan) for target in targets])
    refined = distil(unknown, optax.adam(0.01), passes=2, cross_entropy=1.0)
    assert refined.losses == distil(student, optax.adam(0.01), passes=2, cross_entropy=1.0).losses
    assert refined.outcome is refine.Outcome.IMPROVED


def test_a_window_of_one_token_has_no_next_one(student):
    *others, ids, targets = student
    short = (*others, [x[:, :1] for x in ids], [target[:, :1] for target in targets])
    refined = distil(short, optax.adam(0.01), passes=2, cross_entropy=0.3)
    assert np.all(np.isfinite(refined.losses))


def test_the_loss_falls_and_the_zeros_stay(student):
    pruned = student[1]
    refined = distil(student, optax.adam(0.01), passes=12)
    assert refined.outcome is refine.Outcome.IMPROVED
    assert refined.losses[-1] < 0.6 * refined.losses[0]
    np.testing.assert_array_equal(refined.params["kernel"] == 0, pruned["kernel"] == 0)


def test_a_training_goes_on_with_the_same_bits(student):
    states = []

    def run(**more):
        optimizer = optax.adam(optax.cosine_decay_schedule(0.01, 10))
        return distil(student, optimizer, passes=2, measured_every=3, **more)

    whole_run = run(on_measured=lambda state: states.append(jax.tree.map(np.array, state)))
    assert [int(state.steps) for state in states] == [3, 6, 9, 10]
    for state in states[:3]:
        again = run(resume=lambda begun, state=state: restored(state))
        np.testing.assert_array_equal(again.params["kernel"], whole_run.params["kernel"])
        assert again.losses == whole_run.losses


def restored(state):
    arrays = jax.tree.map(jnp.asarray, state)
    losses = [float(loss) for loss in state.losses]
    return arrays._replace(losses=losses, steps=int(state.steps))


def test_unequal_batches_and_a_share_beyond_one_are_refused(student):
    _, pruned, outer, ids, targets = student
    with pytest.raises(ValueError, match="6 batches of tokens, but 5 of targets"):
        refine.train_model(features, logits, pruned, outer, ids, targets[1:], optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"a share of cross-entropy of 1.5 is not from 0 to 1"):
        refine.train_model(
            features, logits, pruned, outer, ids, targets, optax.sgd(0.1), cross_entropy=1.5
        )


def exact_hidden(model, ids):
    """The last layer's output, layer by layer."""
    hidden = decoder.embed(model.config, embedding_weights(model), jnp.asarray(ids))
    for index, layer in enumerate(model.config.layers):
        hidden = decoder.layer(layer, layer_weights(model, index), hidden, decoder.no_tap)
    return hidden


@pytest.mark.parametrize("variant", ["llama1", "gpt2"])
def test_the_whole_model_is_its_layers(tmp_path, variant):
    write_tiny(tmp_path / "model", variant)
    model = load_model(open_checkpoint(tmp_path / "model"))
    ids = jnp.asarray(tokens(batch=2, length=24))
    layers = [layer_weights(model, index) for index in range(len(model.config.layers))]
    outer = embedding_weights(model) | head_weights(model)
    expected = exact_hidden(model, ids)
    stacked = whole.stacked(
        model.config,
        lambda index, name: layers[index][name],
        lambda name, tensors: jnp.stack(tensors),
    )
    found = whole.features(model.config, stacked, outer, ids)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    for given, back in zip(layers, whole.unstacked(model.config, stacked), strict=True):
        jax.tree.map(np.testing.assert_array_equal, given, back)


def test_linears_and_head_multiply_in_bfloat16_and_little_is_lost(tmp_path):
    write_tiny(tmp_path / "model", "mixtral")
    model = load_model(open_checkpoint(tmp_path / "model"))
    params = whole.stacked(
        model.config,
        lambda index, name: layer_weights(model, index)[name],
        lambda name, tensors: jnp.stack(tensors),
    )
    ids = jnp.asarray(tokens(batch=2, length=24))
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


@pytest.mark.optimized
def test_a_product_in_bfloat16_has_sums_of_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight, cotangent = (
        jax.random.normal(key, shape, jnp.float32)
        for key, shape in zip(keys, [(2, 48, 640), (96, 640), (2, 48, 96)], strict=True)
    )

    def product(x, weight):
        used = decoder.computed_in("bfloat16", {"weight": weight}, {"weight"})["weight"]
        return decoder.linear(x, used)

    @jax.jit
    def forwards_and_backwards(x, weight, cotangent):
        y, gradient = jax.vjp(product, x, weight)
        return y, *gradient(cotangent)

    found = forwards_and_backwards(x, weight, cotangent)
    x, weight, cotangent = (
        np.asarray(operand.astype(jnp.bfloat16), np.float64) for operand in (x, weight, cotangent)
    )
    expected = [x @ weight.T, cotangent @ weight, np.einsum("bto,bti->oi", cotangent, x)]
    assert {y.dtype for y in found} == {jnp.dtype("float32")}
    # The gradient of the weight is rounded, to what the weight is.
    for y, exact, digits in zip(found, expected, (20, 20, 8), strict=True):
        np.testing.assert_allclose(y, exact, rtol=2.0**-digits, atol=1e-4)


@pytest.fixture
def workspace(tmp_path):
    write_tiny(tmp_path / "model", dtype="bfloat16")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--method", "wanda", "--sequence-length", "32", "--samples", "8", "--quiet"]
    command = ["prune", tmp_path / "model", tmp_path / "pruned", *options]
    command += ["--calibration", tmp_path / "text.txt"]
    assert main([str(argument) for argument in command]) == 0
    return tmp_path


def distilled(workspace, destination="out", *more):
    options = ["--text", workspace / "text.txt", "--sequence-length", "32", "--samples", "16"]
    every = [workspace / "model", workspace / "pruned", workspace / destination, *options]
    return main(["distill", *map(str, every), "--rate", "0.003", "--quiet", *map(str, more)])


def test_the_command_trains_every_tensor_of_the_layers(workspace, capsys):
    assert distilled(workspace, "out", "--passes", "3", "--step-windows", "2", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["outcome"] == "improved"
    assert min(report["losses"]) < 0.9 * report["losses"][0]
    assert (report["steps"], report["tokens"]) == (3 * 7, 3 * 7 * 2 * 32)
    source = str(workspace / "model")
    assert main(["verify", str(workspace / "out"), "--source", source, "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["problems"] == {}
    assert any("norm" in name for name in verified["refined"])
    before, after = open_checkpoint(workspace / "pruned"), open_checkpoint(workspace / "out")
    for name in before.tensors:
        old, new = before.read(name), after.read(name)
        assert new.dtype == old.dtype
        changed = ".layers." in name
        assert np.any(new != old) == changed, name
        if "proj" in name:
            np.testing.assert_array_equal(new == 0, old == 0)


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
    for parts in (1, 4):
        more = ["--step-windows", "4", "--micro-batches", parts, "--json", "--overwrite"]
        assert distilled(workspace, "out", *more) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["steps"], report["tokens"]) == (3, 3 * 4 * 32)
        losses.append(report["losses"])
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert distilled(workspace, "out", *more, "--warmup", "1") == 0
    assert json.loads(capsys.readouterr().out)["losses"][1:] != losses[1][1:]
    assert distilled(workspace, "other", "--step-windows", "4", "--micro-batches", "3") == 2
    assert "3 micro-batches do not divide 4 windows of a step" in capsys.readouterr().err


def test_more_devices_than_there_are_do_not_share_heads(workspace, capsys):
    assert distilled(workspace, "out", "--tensor-parallel", "64") == 2
    said = "64 devices are to share heads and widths, and a process has 1"
    assert said in capsys.readouterr().err


def test_the_dense_model_multiplies_in_the_same_dtype(workspace):
    model = load_model(open_checkpoint(workspace / "model"))
    windows = np.asarray(tokens(batch=4, length=24))
    exact, rounded = (_targets(model, windows, 2, dtype) for dtype in COMPUTE_DTYPES)
    expected = exact_hidden(model, windows)
    np.testing.assert_allclose(np.concatenate(exact), expected, rtol=1e-5, atol=1e-5)
    error = np.concatenate(rounded) - expected
    assert 0 < np.max(np.abs(error)) < 0.03 * np.max(np.abs(expected))


def test_the_dense_model_predicts_by_its_own_head(workspace, capsys):
    config = config_dict()
    weights = random_weights(config)
    write_folder(workspace / "dense", config, weights)
    weights["lm_head.weight"] = np.zeros_like(weights["lm_head.weight"])
    weights[Q_PROJ][0, 0] = 0
    write_folder(workspace / "student", config, weights)
    command = ["distill", *(str(workspace / name) for name in ("dense", "student", "out"))]
    command += ["--text", str(workspace / "text.txt"), "--sequence-length", "32", "--json"]
    assert main([*command, "--samples", "16", "--quiet"]) == 0
    # Of the student all tokens are as probable, whatever it computes.
    losses = json.loads(capsys.readouterr().out)["losses"]
    assert losses[0] > 0.01
    assert losses == pytest.approx([losses[0]] * len(losses))


def test_a_dense_model_is_not_trained_as_a_pruned_one(workspace, capsys):
    config = config_dict()
    weights = random_weights(config)
    weights[Q_PROJ][0, 0] = 0  # as float16 has them
    write_folder(workspace / "dense", config, weights)
    command = ["distill", workspace / "dense", workspace / "dense", workspace / "out", "--quiet"]
    command += ["--text", workspace / "text.txt", "--sequence-length", "32", "--samples", "16"]
    assert main([*map(str, command)]) == 2
    assert "dense has no more zeros in its linears than" in capsys.readouterr().err


def test_a_model_with_a_tenth_of_zeros_keeps_them(workspace):
    options = ["--calibration", workspace / "text.txt", "--sequence-length", "32", "--samples", "8"]
    given = ["prune", workspace / "model", workspace / "few", "--pattern", "10%", "--quiet"]
    assert main([*map(str, given), "--method", "wanda", *map(str, options)]) == 0
    shutil.rmtree(workspace / "pruned")
    (workspace / "few").rename(workspace / "pruned")
    assert distilled(workspace) == 0
    trained, given = (open_checkpoint(workspace / name).read(Q_PROJ) for name in ("out", "pruned"))
    np.testing.assert_array_equal(trained == 0, given == 0)


def test_windows_that_are_all_held_out_are_refused(workspace):
    dense, pruned = (open_checkpoint(workspace / name) for name in ("model", "pruned"))
    windows = np.zeros((4, 32), np.int32)
    with pytest.raises(CalibrationError, match="all 4 windows are held out"):
        train_checkpoint(dense, pruned, windows, ModelRefinement(held_out=1.0))


def test_windows_are_taken_in_an_order_of_their_own():
    windows = np.arange(40).reshape(20, 2)
    found = shuffled(windows)
    assert found.tolist() == shuffled(windows).tolist() != windows.tolist()
    assert sorted(found.tolist()) == windows.tolist()


def test_an_interrupted_command_goes_on_with_the_same_bytes(workspace, monkeypatch, capsys):
    more = ["--compute-dtype", "bfloat16", "--measurements", "3"]
    more += ["--step-windows", "2", "--micro-batches", "2"]
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
    assert not (workspace / "out").exists()
    with monkeypatch.context() as patch:
        # It is refused before any work.
        patch.setattr("prox24._jobs.distill.train_checkpoint", None)
        assert distilled(workspace, "out", *more, "--passes", "2") == 2
        assert "refinement.passes was 1, is 2" in capsys.readouterr().err
    assert distilled(workspace, "out", *more, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["resumed_steps"] < report["steps"]
    assert "no runtime skips them" in report["remark"]
    for path in (workspace / "whole").iterdir():
        assert path.read_bytes() == (workspace / "out" / path.name).read_bytes(), path.name


def test_a_state_that_cannot_be_written_is_one_line(workspace, monkeypatch, capsys):
    def full(*arguments, **keywords):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    assert distilled(workspace, "out", "--state", workspace / "state") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"cannot write the state in {workspace / 'state'}: RESOURCE_EXHAUSTED" in line
    assert not (workspace / "out").exists()


def test_a_place_for_states_that_cannot_be_written_is_found_before_the_training(
    workspace, monkeypatch, capsys
):
    monkeypatch.setattr("prox24._jobs.distill.train_checkpoint", None)
    (workspace / "file").write_text("")
    assert distilled(workspace, "out", "--state", workspace / "file") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"cannot write {workspace / 'file'}: " in line
    assert not (workspace / "out").exists()


@pytest.mark.parametrize(("damaged", "left"), [("arrays", ""), ("about", "{}")])
def test_a_state_that_cannot_be_read_is_named(workspace, capsys, damaged, left):
    assert distilled(workspace, "out", "--state", workspace / "state") == 0
    files = [path for path in workspace.glob(f"state/*/{damaged}/**/*") if path.is_file()]
    for path in files:
        path.write_text(left)
    capsys.readouterr()
    assert distilled(workspace, "again", "--state", workspace / "state") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"the state in {workspace / 'state'} cannot be read" in line
    assert not (workspace / "again").exists()


@pytest.mark.parametrize(
    ("make", "wrong", "said"),
    [
        (ModelRefinement, {"measurements": 0}, "measurements 0 is not positive"),
        (BlockRefinement, {"rate": float("nan")}, "rate nan is not positive"),
        (ModelRefinement, {"warmup": 1.5}, "warmup 1.5 is not from 0 to 1"),
        (BlockRefinement, {"held_out": float("nan")}, "held_out nan is not from 0 to 1"),
        (
            ModelRefinement,
            {"compute_dtype": "float16"},
            "compute_dtype float16 is none of float32, bfloat16",
        ),
        (BlockRefinement, {"compute_dtype": "float16"}, "compute_dtype float16 is none of"),
    ],
)
def test_settings_that_do_not_train_are_refused(make, wrong, said):
    with pytest.raises(ValueError, match=said):
        make(**wrong)


def test_a_training_that_diverges_is_reported_as_json(workspace, capsys):
    assert distilled(workspace, "out", "--rate", "1e15", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["outcome"] == "diverged"
    assert report["losses"][-1] is None
    assert main(["verify", str(workspace / "out"), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("folder", "said"), [("out", "out is or holds"), ("out.unfinished", "is made, is or holds")]
)
def test_the_state_is_not_in_the_destination(workspace, capsys, folder, said):
    assert distilled(workspace, "out", "--state", workspace / folder / "state") == 2
    assert said in capsys.readouterr().err
    assert not (workspace / folder).exists()


def test_the_destination_is_looked_at_before_the_training(workspace, monkeypatch, capsys):
    def trained(*arguments, **keywords):
        pytest.fail("it was trained")

    monkeypatch.setattr("prox24._jobs.distill.train_checkpoint", trained)
    (workspace / "out.unfinished" / "model").mkdir(parents=True)
    job = {"versions": {"prox24": prox24.__version__}}
    (workspace / "out.unfinished" / "job.json").write_text(json.dumps(job))
    (workspace / "out.unfinished" / "journal.jsonl").write_text('{"tensor": "a", "sha256": ""}\n')
    assert distilled(workspace) == 2
    printed = capsys.readouterr().err
    assert "holds 1 tensors of another run: of another command; run as before" in printed


def test_other_models_and_short_texts_are_refused(workspace, capsys):
    write_tiny(workspace / "other", "grouped_heads")
    command = ["distill", str(workspace / "other"), str(workspace / "pruned"), "--quiet"]
    command += [str(workspace / "out"), "--text", str(workspace / "text.txt")]
    assert main([*command, "--samples", "4", "--sequence-length", "32"]) == 2
    assert "are not the same model" in capsys.readouterr().err
    assert distilled(workspace, "out", "--step-windows", "9") == 2
    assert "16 windows are too few for steps of 9" in capsys.readouterr().err
    assert distilled(workspace, "out", "--report", workspace / "no" / "report.json") == 2
    assert f"the folder of {workspace}/no/report.json does not exist" in capsys.readouterr().err
    assert not (workspace / "out").exists()
