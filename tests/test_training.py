"""The training loop: what it learns, what it survives, and what it refuses."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_run
from jax.sharding import Mesh

from jaxling import models, training
from jaxling.models.decoder import Decoder
from jaxling.training import packing, recipe, steps
from jaxling.training.snapshots import Snapshots

CONFIG, RECIPE = training_run.CONFIG, training_run.RECIPE


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens"
    return training.write_tokens(path, training_run.documents(), vocabulary_size=97)


def new_model(**changes):
    return models.build({**CONFIG, **changes}, jax.random.key(0))


def run(model, file, workdir, settings=RECIPE, **options):
    options = {"progress": False, "snapshot_every": 7, **options}
    return training.train(model, file, settings, workdir=workdir, **options)


def lines(workdir):
    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(workdir):
    return {r["step"]: r["loss"] for r in lines(workdir) if "evaluation" not in r}


def parameters_of(model):
    return {n: np.asarray(p) for n, p in steps.take_apart(model)[1].items()}


def test_it_learns_what_follows_what(file, tmp_path):
    """Every token follows from the one before: the loss goes towards nothing."""
    model = new_model()
    before = training.evaluate(model, file, RECIPE)
    settings = RECIPE._replace(steps=400, learning_rate=1e-2, rates=())
    outcome = run(
        model, file, tmp_path, settings, evaluations={"all": file}, evaluate_every=200
    )
    after = outcome.evaluations["all"]
    assert after == training.evaluate(model, file, RECIPE)
    np.testing.assert_allclose(before.loss, np.log(97), atol=0.05)
    assert after.loss < 0.3 * before.loss
    assert after.targets == len(file.tokens) - count_of_pieces(file)
    measured = [r for r in lines(tmp_path) if "evaluation" in r]
    assert [r["step"] for r in measured] == [200, 400]
    assert measured[1]["loss"] == after.loss
    np.testing.assert_allclose(after.perplexity, np.exp(after.loss))


def count_of_pieces(file):
    return int(np.sum(-(-np.diff(file.documents) // RECIPE.length)))


def plain_loss(frame, parameters, batch):
    """Mean cross-entropy from the model's own logits."""
    logits = frame.model(parameters)(
        batch.tokens, batch.segments != 0, segment_ids=batch.segments
    )
    log_p = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_p, batch.tokens[:, 1:, None], -1)[..., 0]
    weight = batch.targets[:, 1:]
    return -(picked * weight).sum() / weight.sum()


def test_steps_are_those_of_optax_on_the_plain_loss(file, tmp_path):
    settings = RECIPE._replace(steps=4, rates=(), no_decay="nothing")
    model = new_model()
    frame, parameters = steps.take_apart(model)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            lambda step: 2e-3 * (step + 1) / 5, b1=0.9, b2=0.95, weight_decay=0.1
        ),
    )
    state, expected = optimizer.init(parameters), []
    gradient = jax.jit(jax.value_and_grad(lambda p, batch: plain_loss(frame, p, batch)))
    batches = packing.training_batches(file, rows=8, length=32, seed=0)
    for _, (batch, _) in zip(range(4), batches):
        batch = packing.Batch(*map(jnp.asarray, batch))
        loss, gradients = gradient(parameters, batch)
        updates, state = optimizer.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        expected.append(float(loss))
    run(model, file, tmp_path, settings)
    np.testing.assert_allclose(list(losses(tmp_path).values()), expected, rtol=1e-5)
    for name, found in parameters_of(model).items():
        # Adam divides by the root of tiny second moments: rounding grows there.
        np.testing.assert_allclose(found, parameters[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["accumulated", "eight devices", "both"])
def test_parts_and_devices_change_rounding_only(file, tmp_path, kind):
    settings = RECIPE._replace(steps=12, batch=16)
    plain, other = new_model(), new_model()
    run(plain, file, tmp_path / "plain", settings)
    mesh = None
    if kind != "accumulated":
        mesh = Mesh(np.array(jax.devices()), ("data",))
        assert mesh.size == 8
    if kind != "eight devices":
        settings = settings._replace(accumulate=2)
    outcome = run(
        other, file, tmp_path / "other", settings, mesh=mesh, evaluations={"all": file}
    )
    np.testing.assert_allclose(
        list(losses(tmp_path / "other").values()),
        list(losses(tmp_path / "plain").values()),
        rtol=1e-5,
    )
    expected = parameters_of(plain)
    for name, found in parameters_of(other).items():
        # Adam divides by the root of tiny second moments: rounding grows there.
        np.testing.assert_allclose(found, expected[name], atol=1e-4, err_msg=name)
    alone = training.evaluate(other, file, settings)
    np.testing.assert_allclose(outcome.evaluations["all"].loss, alone.loss, rtol=1e-5)


def test_bfloat16_is_of_the_products_only(file, tmp_path):
    model = new_model()
    settings = RECIPE._replace(dtype="bfloat16")
    run(model, file, tmp_path / "half", settings)
    run(new_model(), file, tmp_path / "full")
    for name, found in parameters_of(model).items():
        assert found.dtype == np.float32
        rounded = found.astype(jnp.bfloat16).astype(np.float32)
        assert np.any(rounded != found), name
    half, full = losses(tmp_path / "half"), losses(tmp_path / "full")
    assert half != full
    # Eight bits of mantissa: 0.4% of an activation, less of a mean loss.
    np.testing.assert_allclose(list(half.values()), list(full.values()), rtol=1e-2)


def test_a_frozen_group_stays_and_a_slow_one_is_slow(file, tmp_path):
    start = parameters_of(new_model())
    settings = RECIPE._replace(
        steps=1, warmup_steps=0, clip=None, weight_decay=0.0, learning_rate=1e-3
    )
    rates = (("embedding", 0.0), (r"mlp\..*kernel", 0.1))
    model = new_model()
    run(model, file, tmp_path, settings._replace(rates=rates))
    for name, after in parameters_of(model).items():
        moved = np.abs(after - start[name]).max()
        # The first step of Adam moves every parameter by its rate (0.1% float32 slack).
        rate = 0.0 if name == "embedding" else 1e-4 if "mlp." in name else 1e-3
        np.testing.assert_allclose(moved, rate, rtol=1e-2, err_msg=name)
    state = steps.initial_state(settings._replace(rates=rates), start)
    assert not any("embedding" in str(p) for p in paths(state.moments))
    assert any("embedding" in str(p) for p in paths(state.parameters))


def paths(tree):
    return [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_documents_of_a_row_do_not_see_each_other(tmp_path):
    texts = [[1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12]]
    one = training.write_tokens(tmp_path / "one", texts, vocabulary_size=97)
    model = new_model()
    packed = training.evaluate(model, one, RECIPE)
    loss = 0.0
    for i, text in enumerate(texts):
        alone = training.write_tokens(tmp_path / f"{i}", [text], vocabulary_size=97)
        part = training.evaluate(model, alone, RECIPE)
        loss += part.loss * part.targets
    np.testing.assert_allclose(packed.loss, loss / packed.targets, rtol=1e-6)
    open_rows = training.evaluate(model, one, RECIPE._replace(document_mask=False))
    assert open_rows.targets == packed.targets and open_rows.loss != packed.loss


def test_only_the_targets_count(tmp_path):
    text, chosen = [1, 2, 3, 4, 5, 6], [False, False, False, True, True, False]
    some = training.write_tokens(
        tmp_path / "some", [training.Document(text, chosen)], vocabulary_size=97
    )
    model = new_model()
    logits = np.asarray(model(np.array([text])), np.float64)[0]
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    found = training.evaluate(model, some, RECIPE)
    assert found.targets == 2
    np.testing.assert_allclose(found.loss, -(log_p[2, 4] + log_p[3, 5]) / 2, rtol=1e-5)


def test_a_run_compiles_once(file, tmp_path):
    settings = RECIPE._replace(steps=5, beta2=0.93)
    before = steps.train_step._cache_size()
    run(new_model(), file, tmp_path, settings)
    assert steps.train_step._cache_size() == before + 1


# Survival.


def start(workdir):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    script = pathlib.Path(training_run.__file__)
    return subprocess.Popen(
        [sys.executable, str(script), str(workdir)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_after(process, workdir, step):
    """kill -9 as soon as the line of `step` is there."""
    metrics = pathlib.Path(workdir) / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            break
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_resumed_is_as_if_never_killed(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    undisturbed = start(whole)
    kill_after(start(torn), torn, 4)  # before there is a snapshot
    kill_after(start(torn), torn, 30)
    assert not (torn / "snapshots" / str(RECIPE.steps)).exists()
    for process in (undisturbed, start(torn)):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert sorted(losses(torn)) == list(range(1, RECIPE.steps + 1))
    steps_of = [r["step"] for r in lines(torn)]
    assert steps_of == sorted(set(steps_of))
    for name in ("loss", "gradient_norm", "learning_rate", "targets", "epoch"):
        ours, theirs = ([r[name] for r in lines(d)] for d in (torn, whole))
        assert ours == theirs, name
    ours, theirs = (Snapshots(d / "snapshots").restore().arrays for d in (torn, whole))
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        np.testing.assert_array_equal(found, theirs[name], err_msg=name)


def test_rounded_products_and_parts_are_resumed_to_the_bit(file, tmp_path, monkeypatch):
    settings = RECIPE._replace(steps=16, dtype="bfloat16", accumulate=2)
    whole, torn = new_model(), new_model()
    run(whole, file, tmp_path / "whole", settings)

    def stop(settings, step, rate=recipe.learning_rate):
        if step == 11:
            raise KeyboardInterrupt
        return rate(settings, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recipe, "learning_rate", stop)
        run(torn, file, tmp_path / "torn", settings)
    assert os.listdir(tmp_path / "torn" / "snapshots") == ["7"]
    run(torn, file, tmp_path / "torn", settings)
    assert losses(tmp_path / "torn") == losses(tmp_path / "whole")
    expected = parameters_of(whole)
    for name, found in parameters_of(torn).items():
        np.testing.assert_array_equal(found, expected[name], err_msg=name)


@pytest.fixture
def finished(file, tmp_path):
    """A run of 21 steps with snapshots at 7, 14 and 21."""
    run(new_model(), file, tmp_path, RECIPE._replace(steps=21))
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["14", "21", "7"]
    return tmp_path


def largest_file(directory):
    files = [p for p in directory.rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def damage(directory, kind):
    path = largest_file(directory)
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[:100])
    elif kind == "missing":
        path.unlink()
    elif kind == "record":
        (directory / "record" / "metadata").write_text("{}")


@pytest.mark.parametrize("kind", ["flipped", "cut", "missing", "record"])
def test_a_damaged_snapshot_falls_back_to_the_one_before(finished, file, kind):
    before = losses(finished)
    damage(finished / "snapshots" / "21", kind)
    model = new_model()
    with pytest.warns(UserWarning, match=r"snapshots/21.*snapshots/14"):
        outcome = run(model, file, finished, RECIPE._replace(steps=21))
    assert outcome.snapshot.name == "21"
    assert losses(finished) == before
    assert (finished / "snapshots" / "21.damaged").is_dir()
    # And the new one is whole.
    run(new_model(), file, finished, RECIPE._replace(steps=21))


def test_only_damaged_snapshots_stop_the_run(finished, file):
    for step in (7, 14, 21):
        damage(finished / "snapshots" / str(step), "flipped")
    with pytest.raises(ValueError, match="Every snapshot is damaged"):
        run(new_model(), file, finished, RECIPE._replace(steps=21))


def test_a_finished_run_is_finished(finished, file):
    before, model, again = losses(finished), new_model(), new_model()
    outcome = run(model, file, finished, RECIPE._replace(steps=21))
    assert outcome.step == 21 and losses(finished) == before
    assert outcome.loss == before[21]
    run(again, file, finished / "anew", RECIPE._replace(steps=21))
    expected = parameters_of(again)
    for name, found in parameters_of(model).items():
        np.testing.assert_array_equal(found, expected[name])


def test_another_run_is_refused(finished, file, tmp_path):
    with pytest.raises(ValueError, match="learning_rate was 0.002 and is now 0.1"):
        run(new_model(), file, finished, RECIPE._replace(steps=21, learning_rate=0.1))
    other = training.write_tokens(tmp_path / "other", [[1, 2, 3]], vocabulary_size=97)
    with pytest.raises(ValueError, match="tokens was"):
        run(new_model(), other, finished, RECIPE._replace(steps=21))
    # Of other shapes, of equal shapes and another meaning, and of other weights.
    others = {
        "config.intermediate_size was 32 and is now 48": new_model(
            intermediate_size=48
        ),
        "config.rope_theta was None and is now 500.0": new_model(rope_theta=500.0),
        "first parameters was": models.build(CONFIG, jax.random.key(1)),
    }
    for message, model in others.items():
        with pytest.raises(ValueError, match=message):
            run(model, file, finished, RECIPE._replace(steps=21))


@pytest.mark.parametrize("every, good", [(1, 10), (4, 8), (11, None)])
def test_a_loss_that_is_no_number_stops_the_run(
    file, tmp_path, monkeypatch, every, good
):
    """Step 11 ruins the parameters; its own loss is still fine, that of step 12 not."""
    monkeypatch.setattr(
        recipe, "learning_rate", lambda _, step: np.inf if step == 10 else 1e-3
    )
    where = "there is no snapshot yet" if good is None else f"snapshots/{good} is good"
    with pytest.raises(training.Diverged, match=f"step 12 is nan.*{where}"):
        run(new_model(), file, tmp_path, snapshot_every=every)
    assert lines(tmp_path)[-1]["loss"] is None
    monkeypatch.undo()
    if good:
        run(new_model(), file, tmp_path)
        assert sorted(losses(tmp_path)) == list(range(1, RECIPE.steps + 1))


def test_the_last_step_is_judged_too(file, tmp_path, monkeypatch):
    """Step 9 of 9 ruins the parameters, and no loss comes after it."""
    monkeypatch.setattr(
        recipe, "learning_rate", lambda _, step: np.inf if step == 8 else 1e-3
    )
    settings = RECIPE._replace(steps=9)
    with pytest.raises(training.Diverged, match="Step 9 left .*snapshots/7 is good"):
        run(new_model(), file, tmp_path, settings)
    assert os.listdir(tmp_path / "snapshots") == ["7"]
    monkeypatch.undo()
    assert run(new_model(), file, tmp_path, settings).step == 9


def test_an_evaluation_that_is_no_number_stops_the_run(file, tmp_path, monkeypatch):
    """Step 8 ruins the parameters, which are evaluated before they are kept."""
    monkeypatch.setattr(
        recipe, "learning_rate", lambda _, step: np.inf if step == 7 else 1e-3
    )
    options = dict(snapshot_every=4, evaluations={"all": file}, evaluate_every=8)
    with pytest.raises(
        training.Diverged, match="After step 8 the loss on 'all' is nan.*/4 is good"
    ):
        run(new_model(), file, tmp_path, **options)
    assert np.isnan(training.Evaluation(np.nan, 1).perplexity)


def test_transformers_opens_the_export_with_the_same_logits(file, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = new_model()
    run(model, file, tmp_path / "run")
    models.save(model, tmp_path / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = np.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(tokens), expected, atol=5e-5)


NARROW = dict(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)
GROUPED = dict(NARROW, num_key_value_heads=1, head_dim=8)
WINDOWS = dict(GROUPED, sliding_window=4)
FAMILIES = {
    "bloom": dict(vocab_size=97, hidden_size=16, n_layer=2, n_head=2),
    "gemma2": dict(WINDOWS, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "gemma3_text": dict(WINDOWS, query_pre_attn_scalar=8),
    "gpt2": dict(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gpt_neox": NARROW,
    "llama": GROUPED,
    "mistral": WINDOWS,
    "olmo": dict(NARROW, num_key_value_heads=1),
    "olmo2": dict(NARROW, num_key_value_heads=1),
    "qwen2": dict(NARROW, num_key_value_heads=1),
    "qwen3": GROUPED,
    "xglm": dict(
        vocab_size=97,
        d_model=16,
        ffn_dim=24,
        num_layers=2,
        attention_heads=2,
        max_position_embeddings=64,
    ),
}


# A slope for a position and a norm of the embedding; soft caps, windows and norms on
# both sides; learned positions and biases.
ALWAYS = ("bloom", "gemma2", "gpt2")


def test_no_family_of_decoders_is_forgotten():
    decoders = {
        name for name, family in models.FAMILIES.items() if family.model is Decoder
    }
    assert decoders == set(FAMILIES)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_every_family_trains_and_transformers_opens_it(tmp_path, family):
    """Packed rows have the loss that transformers has on each document alone."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    texts = [[(k + 1) * 5**i % 97 for i in range(4 + k)] for k in range(8)]
    file = training.write_tokens(tmp_path / "tokens", texts, vocabulary_size=97)
    settings = RECIPE._replace(
        steps=2, batch=2, length=24, warmup_steps=0, learning_rate=1e-2, rates=()
    )
    config = {"model_type": family, **FAMILIES[family]}
    model = models.build(config, jax.random.key(0))
    before = training.evaluate(model, file, settings)
    outcome = run(model, file, tmp_path / "run", settings, evaluations={"all": file})
    after = outcome.evaluations["all"]
    assert np.isfinite(after.loss) and after.loss < before.loss - 0.01
    models.save(model, tmp_path / "export")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, attn_implementation="eager"
    )
    loss = 0.0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text])
            logits = theirs(ids).logits[0]
            loss += torch.nn.functional.cross_entropy(
                logits[:-1], ids[0, 1:], reduction="sum"
            ).item()
    np.testing.assert_allclose(after.loss, loss / after.targets, atol=5e-5)
    np.testing.assert_allclose(model(np.array([texts[-1]]))[0], logits, atol=5e-5)


# Recipes.


def test_the_schedule_rises_falls_and_stays():
    settings = training.Recipe(
        steps=110, warmup_steps=10, learning_rate=1.0, final_rate=0.1
    )
    rates = [training.learning_rate(settings, step) for step in range(120)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10], 1.0)
    np.testing.assert_allclose(rates[60], 0.55)
    np.testing.assert_allclose(rates[110:], 0.1)
    linear = settings._replace(schedule="linear")
    np.testing.assert_allclose(training.learning_rate(linear, 35), 0.775)
    constant = settings._replace(schedule="constant")
    assert training.learning_rate(constant, 100) == 1.0


def test_olmo_s_schedule_gives_its_rates_at_its_steps():
    """6.87e-5 at step 605,000 and 6.83e-5 at 606,000 of OLMo-1B's own schedule."""
    found = [training.learning_rate(training.OLMO, step) for step in (0, 1000)]
    np.testing.assert_allclose(found, [6.87e-5, 6.83e-5], atol=0.5e-7)
    assert training.OLMO.batch * training.OLMO.length * 1000 == 4_194_304_000


def test_olmo_s_optimiser_is_that_of_its_published_config():
    """OLMo-1B.yaml and, for epsilon, the default in olmo/config.py (v0.5.1)."""
    found = training.OLMO
    assert (found.learning_rate, found.beta1, found.beta2) == (4e-4, 0.9, 0.95)
    assert (found.epsilon, found.weight_decay, found.clip) == (1e-5, 0.1, 1.0)
    assert (found.warmup_steps, found.final_rate) == (2000, 0.1)
    # A first step moves a parameter by its gradient's share g / (|g| + epsilon).
    names, gradient = ["block.kernel"], 1e-5
    step = recipe.optimizer(found._replace(clip=None), names)
    weights = {"block.kernel": jnp.zeros(1)}
    moved, _ = step.update(
        {"block.kernel": jnp.full(1, gradient)}, step.init(weights), weights
    )
    np.testing.assert_allclose(moved["block.kernel"], 0.5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "`steps` must be at least 1; got 0"),
        (dict(steps=2.5), "`steps` must be a whole number; got 2.5"),
        (dict(batch=8.0), "`batch` must be a whole number; got 8.0"),
        (dict(decay_steps=-5), "`decay_steps` must be at least 0; got -5"),
        (dict(seed=-1), "`seed` must be at least 0; got -1"),
        (dict(length=1), "`length` must be at least 2"),
        (dict(length=65), "65 is longer than the 64 positions"),
        (dict(accumulate=3), "`batch` must be a multiple of `accumulate`; got 8 and 3"),
        (dict(learning_rate=0.0), "`learning_rate` must be above 0; got 0.0"),
        (dict(learning_rate=float("nan")), "`learning_rate` must be above 0"),
        (dict(warmup_steps=-1), "`warmup_steps` must be at least 0"),
        (dict(beta2=1.0), r"`beta2` must be in \[0, 1\); got 1.0"),
        (dict(final_rate=2.0), r"`final_rate` must be in \[0, 1\]"),
        (dict(clip=0.0), "`clip` must be above 0"),
        (dict(schedule="step"), "`schedule` must be cosine, linear or constant"),
        (dict(dtype="float16"), "`dtype` must be float32 or bfloat16; got 'float16'"),
        (dict(rates=(("(", 1.0),)), "no regular expression"),
        (dict(rates=(("embed", -1.0),)), "must be >= 0; got -1.0"),
        (dict(rates=(("nothing", 1.0),)), "'nothing' is for no parameter.*embedding"),
        (
            dict(rates=(("embed", 0.5), ("embedding", 1.0))),
            r"'embedding' is for no parameter: a pattern before it .*\(embedding\)",
        ),
        (dict(rates=((".", 0.0),)), "nothing is left to train"),
    ],
)
def test_a_bad_recipe_is_named(file, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(new_model(), file, tmp_path, RECIPE._replace(**changes))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_model_that_sees_its_target_is_refused(file, tmp_path):
    config = {
        "model_type": "bert",
        "vocab_size": 97,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 64,
    }
    encoder = models.build(config, jax.random.key(0))
    with pytest.raises(ValueError, match="decoders; the model is an Encoder"):
        run(encoder, file, tmp_path / "run")


def test_text_without_a_target_is_refused(tmp_path):
    lone = training.write_tokens(tmp_path / "lone", [[5], [6]], vocabulary_size=97)
    with pytest.raises(ValueError, match="no token to predict"):
        training.evaluate(new_model(), lone, RECIPE)
    # The first tokens of a document, and of each row that a long one is cut into.
    firsts = training.Document(list(range(64)), [k % 32 == 0 for k in range(64)])
    cut = training.write_tokens(tmp_path / "cut", [firsts], vocabulary_size=97)
    for file in (lone, cut):
        with pytest.raises(ValueError, match=f"{file.path} holds no token to predict"):
            run(new_model(), file, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_damaged_token_file_is_refused_when_a_run_begins(tmp_path):
    path = tmp_path / "tokens"
    good, other = (
        training.write_tokens(p, training_run.documents(), vocabulary_size=97)
        for p in (path, tmp_path / "other")
    )
    run(new_model(), good, tmp_path / "before", RECIPE._replace(steps=7))
    tokens = np.load(path / "tokens.npy")
    tokens[100] = (tokens[100] + 1) % 97
    np.save(path / "tokens.npy", tokens)
    damaged = training.open_tokens(path)
    for begin in (
        lambda: run(new_model(), damaged, tmp_path / "run"),
        lambda: run(new_model(), other, tmp_path / "r", evaluations={"all": damaged}),
        lambda: training.evaluate(new_model(), damaged, RECIPE),
    ):
        with pytest.raises(ValueError, match="tokens is damaged"):
            begin()
    # A run that is resumed is not kept waiting.
    run(new_model(), damaged, tmp_path / "before", RECIPE._replace(steps=7))


def test_tokens_and_devices_have_to_fit(file, tmp_path):
    big = training.write_tokens(tmp_path / "big", [[5, 97]], vocabulary_size=100)
    with pytest.raises(ValueError, match="holds token 97; the model's vocabulary ends"):
        run(new_model(), big, tmp_path / "run")
    mesh = Mesh(np.array(jax.devices()), ("data",))
    with pytest.raises(ValueError, match="1 x 8; got 12"):
        run(new_model(), file, tmp_path / "run", RECIPE._replace(batch=12), mesh=mesh)
    for name in ("snapshot_every", "evaluate_every", "keep"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least"):
            run(new_model(), file, tmp_path / "run", **{name: -1})
