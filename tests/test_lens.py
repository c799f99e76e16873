"""Lenses on a small decoder: against its own logits, trained, saved, refused."""

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from jaxling import lens, models

CONFIG = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def model():
    graph, parameters = nnx.split(models.build(CONFIG, jax.random.key(0)))
    # Matrices ten times those of a fresh model, so that layers differ.
    grown = jax.tree.map(lambda a: a * (10 if a.ndim > 2 else 1), parameters)
    built = nnx.merge(graph, grown)
    built.unembedding[...] = built.unembedding[...] * 20
    return built


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 101, (4, 12))


def test_the_last_layer_says_what_the_model_says(model, tokens):
    found = lens.trajectory(lens.LogitLens(model), tokens, k=3, targets=tokens)
    expected = jax.nn.log_softmax(model(tokens))
    best = np.argsort(-expected, -1)[..., :3]
    np.testing.assert_array_equal(found.top_tokens[-1], best)
    own = np.take_along_axis(np.asarray(expected), tokens[..., None], -1)
    np.testing.assert_allclose(found.target_log_probs[-1], own, atol=1e-4)
    assert found.top_tokens.shape == (3, 4, 12, 3)
    assert np.all(found.agrees[-1])


def test_earlier_layers_are_normed_and_unembedded(model, tokens):
    _, cache = model.run_with_cache(tokens)
    first = model.unembed(model.final_norm(cache["blocks.0.hook_resid_post"]))
    found = lens.trajectory(lens.LogitLens(model), tokens, entropy=True)
    p = jax.nn.softmax(first)
    expected = -np.sum(p * np.log(np.maximum(p, 1e-30)), -1)
    np.testing.assert_allclose(found.entropy[0], expected, atol=1e-4)


def test_training_lowers_the_divergence_and_leaves_the_last_layer_alone(model, tokens):
    rng = np.random.default_rng(2)
    batches = [(rng.integers(0, 101, (4, 12)), np.ones((4, 12))) for _ in range(90)]
    trained = lens.train_tuned_lens(model, batches, learning_rate=1e-2)
    assert trained.losses[-5:].mean() < 0.7 * trained.losses[0]
    before = lens.trajectory(lens.LogitLens(model), tokens, divergence=True)
    after = lens.trajectory(trained.lens, tokens, divergence=True)
    assert np.mean(after.kl_to_final[:-1]) < np.mean(before.kl_to_final[:-1])
    np.testing.assert_array_equal(after.kl_to_final[-1], 0)
    assert trained.lens.reading == "tuned lens"


def test_one_program_trains_lenses_of_models_of_one_shape(model, tokens):
    """So the unembedding is none of its constants, whose size is limited."""
    batches = [(tokens, np.ones((4, 12)))]
    lens.train_tuned_lens(model, batches)
    before = lens._step._cache_size()
    other = models.build(CONFIG, jax.random.key(1))
    assert lens.train_tuned_lens(other, batches).losses[0] != 0
    assert lens._step._cache_size() == before


def test_padding_does_not_train_the_lens(model, tokens):
    mask = np.ones((4, 12))
    mask[:, 8:] = 0
    changed = np.where(mask, tokens, 7)
    found = [
        lens.train_tuned_lens(model, [(t, mask)]).lens.weights
        for t in (tokens, changed)
    ]
    np.testing.assert_allclose(*found, atol=1e-6)


def test_a_lens_is_saved_for_one_model_only(model, tokens, tmp_path):
    trained = lens.train_tuned_lens(model, [(tokens, np.ones((4, 12)))]).lens
    lens.save_lens(trained, tmp_path / "lens")
    again = lens.load_lens(model, tmp_path / "lens")
    np.testing.assert_array_equal(again.weights, trained.weights)
    np.testing.assert_array_equal(again.biases, trained.biases)
    assert again.stack == trained.stack
    other = models.build(CONFIG, jax.random.key(1))
    with pytest.raises(ValueError, match="another model"):
        lens.load_lens(other, tmp_path / "lens")
    with pytest.raises(ValueError, match="holds no tuned lens"):
        lens.load_lens(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="exists already"):
        lens.save_lens(trained, tmp_path / "lens")


def test_nothing_to_train_is_said(model):
    with pytest.raises(ValueError, match="at least one batch"):
        lens.train_tuned_lens(model, [])
    flat = models.build({**CONFIG, "num_hidden_layers": 1}, jax.random.key(0))
    batch = np.zeros((1, 3), int), np.ones((1, 3))
    with pytest.raises(ValueError, match="no layer to translate"):
        lens.train_tuned_lens(flat, [batch])
    broken = models.build(CONFIG, jax.random.key(0))
    broken.unembedding[...] = broken.unembedding[...].at[5, 5].set(np.nan)
    with pytest.raises(ValueError, match="loss of step 1 is nan"):
        lens.train_tuned_lens(broken, [batch])


def test_shared_tokens_bound_a_groups_mass(model, tokens):
    groups = lens.token_groups({"a": {1, 2, 3}, "b": {3, 4}, "none": set()}, 101)
    found = lens.trajectory(lens.LogitLens(model), tokens, groups=groups.weights)
    bounds = lens.mass_bounds(groups, found.group_mass)
    p = np.asarray(jax.nn.softmax(model(tokens)))
    np.testing.assert_allclose(bounds.lower[-1, ..., 0], p[..., [1, 2]].sum(-1), 1e-4)
    np.testing.assert_allclose(bounds.upper[-1, ..., 1], p[..., [3, 4]].sum(-1), 1e-4)
    assert np.all(bounds.upper[..., 2] == 0)
    with pytest.raises(ValueError, match="Tokens of a"):
        lens.token_groups({"a": {101}}, 101)


BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_a_masked_language_model_is_read_through_its_head(tokens):
    model = models.build(BERT, jax.random.key(4))
    mask = np.ones_like(tokens)
    mask[:, 9:] = 0
    found = lens.trajectory(lens.LogitLens(model), tokens, mask, k=2, targets=tokens)
    log_probs = np.asarray(jax.nn.log_softmax(model(tokens, mask)))
    np.testing.assert_array_equal(found.top_tokens[-1], np.argsort(-log_probs)[..., :2])
    own = np.take_along_axis(log_probs, tokens[..., None], -1)
    np.testing.assert_allclose(found.target_log_probs[-1], own, atol=1e-4)


def t5(**changes):
    config = {
        "model_type": "t5",
        "vocab_size": 101,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return models.build(config | changes, jax.random.key(5))


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_of_a_pair_says_what_the_pair_says(tokens, tied):
    model = t5(tie_word_embeddings=tied)
    inputs = {"decoder_tokens": tokens[:, :5]}
    view = lens.LogitLens(model, "decoder.")
    found = lens.trajectory(view, tokens, inputs=inputs, k=2, entropy=True)
    log_probs = np.asarray(jax.nn.log_softmax(model(tokens, **inputs)))
    assert found.top_tokens.shape == (2, 4, 5, 2)
    np.testing.assert_array_equal(found.top_tokens[-1], np.argsort(-log_probs)[..., :2])
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)
    np.testing.assert_allclose(found.entropy[-1], entropy, atol=1e-4)
    assert view.reading == "logit lens"


def test_the_encoder_of_a_pair_is_read_through_the_shared_embedding(tokens):
    model = t5(tie_word_embeddings=False)
    view = lens.LogitLens(model, "encoder.")
    assert "encoder" in view.reading and "shared embedding" in view.reading
    inputs = {"decoder_tokens": tokens[:, :2]}
    found = lens.trajectory(view, tokens, inputs=inputs, k=3)
    normed = model.encode(tokens, np.ones(tokens.shape, bool))
    logits = np.asarray(normed) @ np.asarray(model.embedding[...]).T
    np.testing.assert_array_equal(found.top_tokens[-1], np.argsort(-logits)[..., :3])


@pytest.mark.parametrize("stack", ["encoder.", "decoder."])
def test_a_lens_is_tuned_for_either_stack_of_a_pair(tokens, stack):
    model = t5()
    said = tokens[:, :5]
    inputs = {"decoder_tokens": said, "decoder_attention_mask": said > 0}
    batches = [lens.Batch(tokens, tokens > 0, inputs)] * 20
    trained = lens.train_tuned_lens(model, batches, learning_rate=1e-2, stack=stack)
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    options = dict(inputs={"decoder_tokens": tokens[:, :5]}, divergence=True)
    views = lens.LogitLens(model, stack), trained.lens
    plain, tuned = (lens.trajectory(v, tokens, **options).kl_to_final for v in views)
    assert tuned[0].mean() < plain[0].mean()
    assert ("encoder" in trained.lens.reading) == (stack == "encoder.")


def test_training_batches_are_padded_texts():
    letters = tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "z": 25}, "a")
    tokenizer = tokenizers.Tokenizer(letters)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    texts = ["abc", "", "z"]
    batches = list(lens.training_batches(texts, tokenizer, steps=3, batch=4, length=2))
    assert len(batches) == 3
    rows = {(tuple(t), tuple(m)) for b in batches for t, m in zip(*b[:2])}
    assert rows == {((0, 1), (True, True)), ((25, 0), (True, False))}
    with pytest.raises(ValueError, match="no token"):
        next(lens.training_batches([""], tokenizer, steps=1))
    # Of a pair the decoder reads what is behind a tab, or the same.
    options = dict(steps=3, batch=4, length=3, begin=[7])
    batches = list(lens.training_batches(["ab\tc", "b"], tokenizer, **options))
    rows = {
        tuple(map(tuple, row))
        for b in batches
        for row in zip(b.tokens, b.mask, *b.inputs.values())
    }
    one, two = (True, False, False), (True, True, False)
    assert rows == {
        ((0, 1, 0), two, (7, 2, 0), two),
        ((1, 0, 0), one, (7, 1, 0), two),
    }
