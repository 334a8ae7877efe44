"""Training the kept weights of a whole model on the dense model's predictions."""

import errno
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import calibrated, contents, error_line, printed_json, run, write_workspace
from safetensors.numpy import load_file, save_file
from tiny import (
    Q_PROJ,
    assert_close,
    config_dict,
    random_weights,
    rounding,
    tokens,
    write_edited,
    write_folder,
    write_tiny,
)

import prox24
from prox24 import refine
from prox24._checkpoints.checkpoint import open_checkpoint
from prox24._core.precision import COMPUTE_DTYPES
from prox24._jobs.forward import embedding_weights, head_weights, layer_weights, load_model
from prox24._jobs.training import _functions, _outer, _targets, train_checkpoint
from prox24._models import decoder, spec, stacks
from prox24.refine import BlockRefinement, ModelRefinement

VOCABULARY, WIDTH, LENGTH = 24, 16, 150
UNIT = 2.0**-24
"""What float32 rounds by, relative to a number."""


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


def bfloat16_rounding(products):
    """Relative: each of the products in sequence rounds both operands by 2^-9, independently.

    Three standard deviations.
    """
    return 3 * np.sqrt(2 * products) * 2.0**-9


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
    # A log-probability is off by at most twice what the logits, one product, are.
    atol = 2 * rounding(logits(outer, targets[-1]), layers=0, width=WIDTH)
    np.testing.assert_allclose(refined.losses, expected, rtol=0, atol=atol)


def test_without_a_share_the_text_may_hold_what_is_excluded(student):
    excluded = student[3][0][0, 1]

    def excluding(outer, hidden):
        return logits(outer, hidden).at[..., excluded].set(-jnp.inf)

    refined = distil(student, optax.adam(0.01), excluding, passes=2)
    assert refined.outcome is refine.Outcome.IMPROVED


def test_hidden_states_may_be_of_half_the_width(student):
    def narrow(params, outer, ids):
        return features(params, outer, ids).astype(jnp.bfloat16)

    def scores(outer, hidden):
        return logits(outer, hidden.astype(jnp.float32))

    _, pruned, outer, ids, targets = student
    narrowed = [target.astype(jnp.bfloat16) for target in targets]
    with jax.numpy_dtype_promotion("strict"):
        refined = refine.train_model(
            narrow, scores, pruned, outer, ids, narrowed, optax.sgd(0.1), passes=2
        )
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


def test_each_step_tells_its_loss_before_the_measurement_after_it(student):
    _, pruned, outer, ids, targets = student
    told = []
    distil(
        student,
        optax.sgd(0.0),
        passes=2,
        held_out=2,
        micro_batches=2,
        on_step=lambda step, loss: told.append((step, loss)),
        on_measured=lambda state: told.append(state.steps),
    )
    pairs = zip(ids, targets, strict=True)
    batches = [expected_loss(pruned, outer, outer, *pair, 0.0) for pair in pairs]
    atol = 2 * rounding(logits(outer, targets[-1]), layers=0, width=WIDTH)
    means = [pytest.approx(np.mean(batches[i : i + 2]), rel=0, abs=atol) for i in (0, 2)]
    assert told == [(1, means[0]), (2, means[1]), 2, (3, means[0]), (4, means[1]), 4]


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
    assert_close(found, exact_hidden(model, ids))
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
        # Four products forwards and backwards in each of two layers, and the head's.
        atol = bfloat16_rounding(2 * 8 + 2) * np.max(np.abs(exact))
        np.testing.assert_allclose(found, exact, rtol=0, atol=atol)
        assert np.any(found != exact)


def prune(folder, destination, *more):
    places = folder / "model", folder / destination
    assert run("prune", *places, "--method", "wanda", *calibrated(folder), "--quiet", *more) == 0


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A model, a text, and the pruned model."""
    folder = write_workspace(tmp_path_factory.mktemp("template"), dtype="bfloat16")
    prune(folder, "pruned")
    return folder


@pytest.fixture
def workspace(template, tmp_path):
    return shutil.copytree(template, tmp_path, dirs_exist_ok=True)


def distilling(workspace, destination="out", *more, models=("model", "pruned")):
    """A command."""
    places = [workspace / name for name in (*models, destination)]
    options = ["--text", workspace / "text.txt", "--sequence-length", 32, "--samples", 16]
    return ["distill", *places, *options, "--rate", "0.003", "--quiet", *more]


def distilled(*arguments, **models):
    """The exit status."""
    return run(*distilling(*arguments, **models))


@pytest.fixture
def refused(workspace, capsys):
    """What the command prints that is refused, in one line."""

    def line(*more, destination="out", **models):
        found = error_line(capsys, *distilling(workspace, destination, *more, **models))
        assert not (workspace / destination).exists()
        return found

    return line


@pytest.fixture
def untrained(monkeypatch):
    """Fails where a model is trained."""
    monkeypatch.setattr("prox24._jobs.distill.train_checkpoint", None)


def test_the_command_trains_every_tensor_of_the_layers(workspace, capsys):
    options = ["--passes", 3, "--step-windows", 2, "--metrics", workspace / "metrics.jsonl"]
    report = printed_json(capsys, *distilling(workspace, "out", *options))
    assert report["outcome"] == "improved"
    assert min(report["losses"]) < 0.9 * report["losses"][0]
    assert (report["steps"], report["tokens"]) == (3 * 7, 3 * 7 * 2 * 32)
    lines = (workspace / "metrics.jsonl").read_text().splitlines()
    events = {"step": [], "training": []}
    for figures in map(json.loads, lines):
        assert figures["steps"] == 3 * 7
        events[figures["event"]].append((figures["step"], figures["loss"]))
    assert [step for step, _ in events["step"]] == list(range(1, 3 * 7 + 1))
    assert all(0 < loss < 2 * report["losses"][0] for _, loss in events["step"])
    assert [loss for _, loss in events["training"]] == report["losses"][1:]
    card = (workspace / "out" / "README.md").read_text()
    assert card.count("---\n") == 2
    assert "\n- '2:4'\n" in card  # as the pruned model's
    assert card.index("## Pruning") < card.index("## Distillation")
    first, best = report["losses"][0], min(report["losses"])
    assert f"{first:.4f}" in card
    assert f"{best:.4f}" in card
    verify = ["verify", workspace / "out", "--source", workspace / "model"]
    verified = printed_json(capsys, *verify)
    assert verified["problems"] == {}
    assert any("norm" in name for name in verified["refined"])
    before, after = open_checkpoint(workspace / "pruned"), open_checkpoint(workspace / "out")
    for name in before.tensors:
        old, new = before.read(name), after.read(name)
        assert new.dtype == old.dtype
        assert np.any(new != old) == (".layers." in name), name
        assert "proj" not in name or np.array_equal(new == 0, old == 0)


def test_linears_that_the_recipe_left_dense_may_stay_dense(workspace):
    prune(workspace, "partly", "--skip", "layers.0.")
    assert distilled(workspace, models=("model", "partly")) == 0
    verified = prox24.verify(workspace / "out", workspace / "model")
    assert verified.problems == {}
    assert verified.linears == 7  # of layer 1
    assert any("layers.0.mlp.up_proj" in name for name in verified.refined)


def test_the_rate_rises_and_falls():
    rate = ModelRefinement(rate=0.5, warmup=0.25).schedule(40)
    rates = np.array([rate(step) for step in range(41)])
    # A rate is the result of some eight operations on numbers up to 0.5.
    near = 8 * UNIT * 0.5
    np.testing.assert_allclose(rates[:11], np.linspace(0.05, 0.5, 11), rtol=0, atol=near)
    assert rates[10] == rates.max()
    assert np.all(np.diff(rates[10:]) < 0)
    assert abs(rates[-1]) <= near
    for warmup, steps in ((0.0, 1), (1.0, 1), (1.0, 3), (0.1, 2)):
        rate = ModelRefinement(rate=0.5, warmup=warmup).schedule(steps)
        assert abs(max(float(rate(step)) for step in range(steps)) - 0.5) <= near


def test_gradients_are_cut_to_norm_one():
    refinement = ModelRefinement(rate=0.1, warmup=0.0)
    optimizer, plain = refinement.optimizer(100), optax.adam(refinement.schedule(100))
    params = jnp.zeros(4)
    state, expected = optimizer.init(params), plain.init(params)
    for size in (10.0, 0.1, 3.0):
        gradient = jnp.array([1.0, -2.0, 2.0, 4.0]) / 5 * size
        update, state = optimizer.update(gradient, state, params)
        wanted, expected = plain.update(gradient / max(1.0, size), expected, params)
        # Some dozen operations in each.
        np.testing.assert_allclose(update, wanted, rtol=2 * 12 * UNIT)


def test_the_dense_model_multiplies_in_the_same_dtype(workspace):
    model = load_model(open_checkpoint(workspace / "model"))
    windows = np.asarray(tokens(batch=4, length=24))
    exact, rounded = (_targets(model, windows, 2, dtype) for dtype in COMPUTE_DTYPES)
    expected = exact_hidden(model, windows)
    assert_close(np.concatenate(exact), expected)
    error = np.concatenate(rounded) - expected
    # Four products in each of two layers.
    assert 0 < np.max(np.abs(error)) < bfloat16_rounding(2 * 4) * np.max(np.abs(expected))


def test_the_dense_model_predicts_by_its_own_head(workspace, capsys):
    weights = random_weights(config_dict())
    write_folder(workspace / "dense", config_dict(), weights)
    weights["lm_head.weight"] = np.zeros_like(weights["lm_head.weight"])
    weights[Q_PROJ][0, 0] = 0
    write_folder(workspace / "student", config_dict(), weights)
    command = distilling(workspace, models=("dense", "student"))
    losses = printed_json(capsys, *command)["losses"]
    assert losses[0] > 0.01
    # Of the student all tokens are as probable, whatever it computes.
    assert len({*losses}) == 1


def test_models_that_do_not_fit_are_refused_before_one_writes(workspace, refused, monkeypatch):
    monkeypatch.setattr("prox24._jobs.text.generated_windows", None)
    said = refused("--text", "generate:3", models=("pruned", "model"))
    assert "pruned: the dense model comes first" in said
    said = refused("--text", "generate:3", "--step-windows", 10)
    assert "19 windows are too few for steps of 10" in said


def test_models_and_options_that_do_not_fit_are_refused(workspace, refused):
    write_edited(workspace / "dense", Q_PROJ, (0, 0), 0)  # as float16 has them
    write_tiny(workspace / "other", "grouped_heads")
    assert "dense has no more zeros in its linears than" in refused(models=("dense", "dense"))
    assert "are not the same model" in refused(models=("other", "pruned"))
    assert "pruned: the dense model comes first" in refused(models=("pruned", "model"))
    said = refused("--state", workspace / "pruned")
    assert "which is no state of a training: move it away" in said
    devices = "64 devices are to share heads and widths, and a process has 1"
    assert devices in refused("--tensor-parallel", 64)
    assert "16 windows are too few for steps of 9" in refused("--step-windows", 9)
    assert "all 16 windows are held out" in refused("--held-out", 1.0)
    parts = refused("--step-windows", 4, "--micro-batches", 3)
    assert "3 micro-batches do not divide 4 windows of a step" in parts
    report = workspace / "no" / "report.json"
    assert f"the folder of {report} does not exist" in refused("--report", report)


@pytest.mark.slow  # beside the masks of `prune`
def test_a_model_with_a_tenth_of_zeros_keeps_them(workspace):
    prune(workspace, "few", "--pattern", "10%")
    assert distilled(workspace, models=("model", "few")) == 0
    trained, given = (open_checkpoint(workspace / name).read(Q_PROJ) for name in ("out", "few"))
    np.testing.assert_array_equal(trained == 0, given == 0)


@pytest.mark.slow  # beside blocks that go on
def test_an_interrupted_command_goes_on_with_the_same_bytes(
    workspace, monkeypatch, capsys, refused
):
    more = ["--compute-dtype", "bfloat16", "--measurements", 3]
    more += ["--step-windows", 2, "--micro-batches", 2]
    assert distilled(workspace, "whole", *more) == 0
    given, more = train_checkpoint, [*more, "--state", workspace / "state"]
    (workspace / "state/lost+found").mkdir(parents=True)  # as in the root of a disk

    def interrupted(*arguments, on_measured, **keywords):
        def measured(state):
            on_measured(state)
            if len(state.losses) == 3:
                raise KeyboardInterrupt

        return given(*arguments, on_measured=measured, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("prox24._jobs.distill.train_checkpoint", interrupted)
        capsys.readouterr()
        assert distilled(workspace, "out", *more) == 130
        assert f"the training is in {workspace}/state: the same command" in capsys.readouterr().err
        # It is refused before any work.
        patch.setattr("prox24._jobs.distill.train_checkpoint", None)
        assert "refinement.passes was 1, is 2" in refused(*more, "--passes", 2)
        assert "refinement.warmup was 0.1, is 0.5" in refused(*more, "--warmup", 0.5)
    report = printed_json(capsys, *distilling(workspace, "out", *more))
    assert 0 < report["resumed_steps"] < report["steps"]
    assert "no runtime skips them" in report["remark"]
    assert contents(workspace / "out") == contents(workspace / "whole")


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


def test_a_state_that_cannot_be_read_is_named(workspace, refused):
    state = workspace / "state"
    assert distilled(workspace, "out", "--state", state) == 0
    for damaged, left in (("arrays", ""), ("about", "{}")):  # the latter is read first
        for path in state.glob(f"*/{damaged}/**/*"):
            if path.is_file():
                path.write_text(left)
        said = refused("--state", state, destination="again")
        assert f"the state in {state} cannot be read" in said


@pytest.mark.parametrize(
    ("makes", "name", "value", "said"),
    [
        ([ModelRefinement], "measurements", 0, "is not positive"),
        ([ModelRefinement, BlockRefinement], "passes", 1.5, "is not a whole number"),
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
    report = printed_json(capsys, *distilling(workspace, "out", "--rate", "1e15"))
    assert (report["outcome"], report["losses"][-1]) == ("diverged", None)
    assert run("verify", workspace / "out", "--quiet") == 0


def test_a_model_whose_names_have_no_prefix_is_trained(tmp_path):
    prune(write_workspace(tmp_path, "gpt2", dtype="bfloat16"), "pruned")
    path = tmp_path / "pruned" / "model.safetensors"
    weights = {name.removeprefix("transformer."): w for name, w in load_file(path).items()}
    assert "h.0.attn.c_attn.weight" in weights
    save_file(weights, path)
    (tmp_path / "pruned" / "prox24.json").unlink()
    assert distilled(tmp_path) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weights.keys()


def test_a_disk_without_room_is_found_before_the_training(untrained, monkeypatch, refused):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    assert "bytes do not fit" in refused()


def test_other_files_are_written_before_the_training(workspace, untrained, monkeypatch, refused):
    (workspace / "pruned" / "LICENSE").write_text("free")

    def fail(file, copy):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    assert "Input/output error" in refused()


def test_the_destination_is_looked_at_before_the_training(workspace, untrained, refused):
    folder = workspace / "out.unfinished"
    (folder / "model").mkdir(parents=True)
    job = {"versions": {"prox24": prox24.__version__}}
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "journal.jsonl").write_text('{"tensor": "a", "sha256": ""}\n')
    assert "holds 1 tensors of another run: of another command; run as before" in refused()
