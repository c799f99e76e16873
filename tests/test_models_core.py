"""The core that all families share: names, hooks, generation, reading, writing."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from jaxling import models
from jaxling.checkpoints import CheckpointError
from jaxling.models import conversion, generation, model, positions

CONFIG = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=True,
)
POINTS = {
    "hook_resid_pre": (2, 9, 32),
    "hook_resid_mid": (2, 9, 32),
    "hook_resid_post": (2, 9, 32),
    "hook_attn_out": (2, 9, 32),
    "hook_mlp_out": (2, 9, 32),
    "attn.hook_q": (2, 9, 4, 8),
    "attn.hook_k": (2, 9, 2, 8),
    "attn.hook_v": (2, 9, 2, 8),
    "attn.hook_rot_q": (2, 9, 4, 8),
    "attn.hook_rot_k": (2, 9, 2, 8),
    "attn.hook_z": (2, 9, 4, 8),
    "attn.hook_pattern": (2, 4, 9, 9),
    "mlp.hook_post": (2, 9, 48),
}


@pytest.fixture(scope="module")
def llama():
    return models.build(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 64, (2, 9))


@pytest.fixture(scope="module")
def everything(llama, tokens):
    return llama.run_with_cache(tokens, names_filter="*")


# Names.


def test_every_point_has_its_name_and_shape(everything):
    _, cache = everything
    expected = {
        f"blocks.{layer}.{point}": shape
        for point, shape in POINTS.items()
        for layer in range(4)
    }
    expected |= {"hook_embed": (2, 9, 32), "ln_final.hook_normalized": (2, 9, 32)}
    assert {name: value.shape for name, value in cache.items()} == expected
    assert len(cache) == len(expected)


def test_the_points_add_up_to_the_stream(llama, everything):
    logits, cache = everything
    for layer in range(4):
        name = f"blocks.{layer}.hook_"
        mid = cache[name + "resid_pre"] + cache[name + "attn_out"]
        np.testing.assert_array_equal(mid, cache[name + "resid_mid"])
        post = cache[name + "resid_mid"] + cache[name + "mlp_out"]
        np.testing.assert_array_equal(post, cache[name + "resid_post"])
        if layer:
            before = cache[f"blocks.{layer - 1}.hook_resid_post"]
            np.testing.assert_array_equal(cache[name + "resid_pre"], before)
    np.testing.assert_allclose(cache["attn.pattern"].sum(-1), 1, atol=1e-6)
    # In another program the same sums may be taken in another order.
    end = llama.final_norm(cache["resid_post"][-1])
    np.testing.assert_allclose(end, cache["ln_final.hook_normalized"], atol=1e-6)
    np.testing.assert_allclose(llama.unembed(end), logits, atol=1e-6)
    np.testing.assert_array_equal(
        llama.embed(jnp.zeros((1, 1), int)), llama.unembed_matrix[:1][None]
    )
    assert llama.unembed_bias is None and llama.logit_softcap is None


def test_queries_and_keys_before_and_after_their_norms_and_rotation(tokens):
    """Step by step in float64 from the stream that enters the block."""
    config = CONFIG | dict(model_type="qwen3", head_dim=8, num_hidden_layers=2)
    qwen = models.build(config, jax.random.key(0))
    attention, rng = qwen.decoder.blocks.attention, np.random.default_rng(0)
    norms = {"q": attention.query_norm, "k": attention.key_norm}
    for norm in norms.values():
        norm.scale[...] = jnp.asarray(rng.normal(1, 0.2, (2, 8)), jnp.float32)
    cache = qwen.run_with_cache(tokens, names_filter="blocks.1.*")[1]
    cache = {name: np.asarray(cache[name], np.float64) for name in cache}

    def normed(x):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)

    x = normed(cache["blocks.1.hook_resid_pre"])  # the block's norm scales by one
    angle = np.arange(9)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = {}
    for name, kernel in (("q", attention.query.kernel), ("k", attention.key.kernel)):
        before = np.einsum("bpd,dhs->bphs", x, np.asarray(kernel[1], np.float64))
        found = cache[f"blocks.1.attn.hook_{name}"]
        np.testing.assert_allclose(found, before, atol=1e-6)
        after = normed(before) * np.asarray(norms[name].scale[1], np.float64)
        after = (after[..., :4] + 1j * after[..., 4:]) * np.exp(1j * angle)[:, None]
        turned[name] = np.concatenate([after.real, after.imag], -1)
        found = cache[f"blocks.1.attn.hook_rot_{name}"]
        np.testing.assert_allclose(found, turned[name], atol=1e-5)
    scores = np.einsum("bqhs,bkhs->bhqk", turned["q"], turned["k"].repeat(2, 2))
    weights = np.exp(scores / np.sqrt(8)) * np.tri(9)
    pattern = weights / weights.sum(-1, keepdims=True)
    found = cache["blocks.1.attn.hook_pattern"]
    np.testing.assert_allclose(found, pattern, atol=1e-5)


def test_a_family_without_rotation_has_no_rotated_queries(tokens):
    config = dict(model_type="gpt2", vocab_size=64, n_embd=8, n_layer=1, n_head=2)
    gpt2 = models.build(config, jax.random.key(0))
    with pytest.raises(ValueError, match="is called attn.rot_q; it has"):
        gpt2.run_with_cache(tokens, names_filter="attn.rot_q")


def test_a_stack_and_its_layers_are_the_same_values(everything):
    _, cache = everything
    assert cache["resid_post"].shape == (4, 2, 9, 32)
    for layer in range(4):
        one = cache[f"blocks.{layer}.hook_resid_post"]
        np.testing.assert_array_equal(cache["resid_post"][layer], one)
        np.testing.assert_array_equal(cache["resid_post", layer], one)
    np.testing.assert_array_equal(cache["resid_post", -1], cache["resid_post", 3])
    assert "resid_post" in cache and "blocks.4.hook_resid_post" not in cache


@pytest.mark.parametrize(
    "names, kept",
    [
        ("blocks.1.hook_mlp_out", {"blocks.1.hook_mlp_out"}),
        (
            ["blocks.3.hook_resid_mid", "blocks.1.hook_resid_mid", "hook_embed"],
            {"blocks.1.hook_resid_mid", "blocks.3.hook_resid_mid", "hook_embed"},
        ),
        ("attn.pattern", {f"blocks.{i}.attn.hook_pattern" for i in range(4)}),
        ("blocks.[02].hook_attn_out", {f"blocks.{i}.hook_attn_out" for i in (0, 2)}),
        (
            lambda name: name.endswith("2.hook_resid_pre"),
            {"blocks.2.hook_resid_pre"},
        ),
        (None, {"hook_embed"} | {f"blocks.{i}.hook_resid_post" for i in range(4)}),
    ],
)
def test_only_what_is_asked_for_is_kept(llama, tokens, everything, names, kept):
    logits, cache = llama.run_with_cache(tokens, names_filter=names)
    assert set(cache) == kept
    for name in kept:
        np.testing.assert_allclose(cache[name], everything[1][name], atol=1e-6)
    np.testing.assert_allclose(logits, everything[0], atol=1e-6)


def test_some_layers_are_no_stack(llama, tokens):
    _, cache = llama.run_with_cache(tokens, names_filter="blocks.2.hook_resid_post")
    with pytest.raises(KeyError, match="kept at layers"):
        cache["resid_post"]
    with pytest.raises(KeyError, match=r"blocks\.1\.hook_resid_post was not kept"):
        cache["blocks.1.hook_resid_post"]
    with pytest.raises(KeyError, match="nonsense was not kept"):
        cache["nonsense"]


def test_a_predicate_that_chooses_nothing_is_an_error(llama, tokens):
    with pytest.raises(ValueError, match="what the predicate chooses; it has hook_emb"):
        llama.run_with_cache(tokens, names_filter=lambda name: name == "resid_pots")


@pytest.mark.parametrize("name", ["blocks.4.hook_resid_post", "resid_pots", "blocks."])
def test_a_name_that_matches_nothing_is_an_error(llama, tokens, name):
    with pytest.raises(ValueError, match="No activation of this model is called"):
        llama.run_with_cache(tokens, names_filter=[name, "hook_embed"])
    with pytest.raises(ValueError, match=r"it has .*blocks\.\*\.hook_resid_post"):
        llama.run_with_hooks(tokens, hooks={name: lambda x: x})


def test_one_kept_layer_takes_the_memory_of_one_layer():
    """A stack of 12 layers whose one is kept must not be built on the way."""
    llama = models.build(CONFIG | {"num_hidden_layers": 12}, jax.random.key(0))
    graph, parameters = nnx.split(llama)
    tokens = np.zeros((8, 32), int)
    mask = np.ones_like(tokens, bool)

    def memory(names):
        compiled = model._forward.lower(
            graph, parameters, tokens, mask, {}, {}, names=names, dtype=None
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layer = 8 * 4 * 32 * 32 * 4  # bytes of one layer's patterns, the largest point
    alone = memory(("blocks.7.attn.hook_pattern",)) - memory(())
    assert alone < 2.5 * layer  # of 12


def test_a_gradient_keeps_no_attention_pattern_of_the_layers():
    """They grow with the square of the length; the backward pass makes them anew."""
    tokens = np.zeros((1, 512), int)

    def memory(layers):
        changes = {"num_hidden_layers": layers, "max_position_embeddings": 512}
        graph, parameters = nnx.split(models.build(CONFIG | changes, jax.random.key(0)))

        def loss(parameters):
            return nnx.merge(graph, parameters)(tokens).var()

        compiled = jax.jit(jax.grad(loss)).lower(parameters).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    pattern = 4 * 512 * 512 * 4  # bytes of one layer's, in float32
    assert memory(10) - memory(2) < 2 * pattern  # of 8


# Hooks.


def test_a_patched_layer_changes_what_follows_and_nothing_before(llama, tokens):
    other = llama.run_with_cache(tokens[::-1], names_filter="*")[1]
    name = "blocks.1.hook_resid_post"
    logits, cache = llama.run_with_cache(
        tokens,
        names_filter="*",
        hooks={name: lambda x: x.at[:, 4].set(other[name][:, 4])},
    )
    plain = llama.run_with_cache(tokens, names_filter="*")[1]
    for layer in range(4):
        post = f"blocks.{layer}.hook_resid_post"
        changed = np.abs(cache[post] - plain[post]).max((0, 2)) > 0
        # The keys of later positions see the patch from layer 2 on.
        expected = [layer >= 1 and (p == 4 or (p > 4 and layer > 1)) for p in range(9)]
        np.testing.assert_array_equal(changed, expected)
    np.testing.assert_array_equal(cache[name][:, 4], other[name][:, 4])
    # All of the stream at a layer decides all that follows.
    whole = llama.run_with_hooks(tokens, hooks={name: lambda x: other[name]})
    np.testing.assert_allclose(whole, llama(tokens[::-1]), atol=1e-6)


def test_steering_is_jitted_batched_and_differentiable(llama, tokens):
    traces = []

    @jax.jit
    def steered(vector):
        traces.append(0)
        return llama.run_with_hooks(
            tokens, hooks={"blocks.2.hook_mlp_out": lambda x: x + vector}
        )

    vectors = jax.random.normal(jax.random.key(1), (3, 32))
    one_by_one = jnp.stack([steered(v) for v in vectors])
    assert len(traces) == 1
    together = jax.vmap(steered)(vectors)
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    gradient = jax.grad(lambda v: steered(v)[:, :, 5].sum())(vectors[0])
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    step = 1e-2 * vectors[1]
    slope = (
        steered(vectors[0] + step)[:, :, 5].sum()
        - steered(vectors[0] - step)[:, :, 5].sum()
    ) / 2
    # Central differences of float32 sums.
    np.testing.assert_allclose(jnp.vdot(gradient, step), slope, rtol=2e-2)


def test_hooks_apply_in_order_at_one_layer_or_at_all(llama, tokens):
    hooks = {
        "mlp_out": jnp.zeros_like,
        "attn_out": jnp.zeros_like,
        "hook_embed": lambda x: 2 * x,
    }
    logits, cache = llama.run_with_cache(tokens, hooks=hooks)
    for layer in range(4):
        stream = cache["resid_post", layer]
        np.testing.assert_array_equal(stream, cache["hook_embed"])
    np.testing.assert_array_equal(
        cache["hook_embed"], 2 * llama.embed(jnp.asarray(tokens))
    )


def test_a_vector_in_a_partial_compiles_nothing_new(llama, tokens):
    def add(vector, x):
        return x + vector

    def run(value):
        hook = jax.tree_util.Partial(add, jnp.full(32, value))
        return llama.run_with_hooks(tokens, hooks={"blocks.0.hook_resid_post": hook})

    first = run(0.0)
    compiled = model._forward._cache_size()
    assert np.abs(run(1.0) - first).max() > 0
    assert model._forward._cache_size() == compiled


def test_a_method_sees_what_its_object_has_become(llama, tokens):
    class Steering:
        size, layer = 0.0, 0

        def add(self, x):
            return x + self.size

        def chosen(self, name):
            return name == f"blocks.{self.layer}.hook_resid_post"

    steering = Steering()
    hooks = {"blocks.0.hook_resid_post": steering.add}
    first, kept = llama.run_with_cache(
        tokens, hooks=hooks, names_filter=steering.chosen
    )
    assert set(kept) == {"blocks.0.hook_resid_post"}
    steering.size, steering.layer = 1.0, 1
    found, kept = llama.run_with_cache(
        tokens, hooks=hooks, names_filter=steering.chosen
    )
    assert np.abs(found - first).max() > 0
    assert set(kept) == {"blocks.1.hook_resid_post"}


def test_a_hook_keeps_the_shape(llama, tokens):
    with pytest.raises(ValueError, match="must return the shape it was given"):
        llama.run_with_hooks(tokens, hooks={"hook_embed": lambda x: x[:, :1]})


# Inputs.


def test_a_shape_is_compiled_once(llama):
    tokens = np.arange(12).reshape(2, 6)
    llama(tokens)
    compiled = model._forward._cache_size()
    llama(tokens + 1)
    llama(tokens, np.ones_like(tokens))
    fresh = nnx.merge(*nnx.split(llama))
    fresh(tokens)
    assert model._forward._cache_size() == compiled
    llama(tokens[:, :5])
    assert model._forward._cache_size() == compiled + 1


def test_padding_changes_nothing_at_real_positions(llama, tokens):
    plain = np.asarray(llama(tokens))
    junk, mask = np.full((2, 4), 63), np.ones((2, 13), int)
    mask[:, :4] = 0
    left = llama(np.concatenate([junk, tokens], 1), mask)
    np.testing.assert_allclose(left[:, 4:], plain, atol=2e-6)
    right = llama(np.concatenate([tokens, junk], 1), mask[:, ::-1])
    np.testing.assert_allclose(right[:, :9], plain, atol=2e-6)
    assert np.isfinite(left).all() and np.isfinite(right).all()


def test_packed_documents_do_not_see_each_other(llama, tokens):
    packed = tokens.reshape(1, 18)
    segments = np.repeat([[5, 2]], 9, axis=1)
    np.testing.assert_allclose(
        llama(packed, segment_ids=segments).reshape(2, 9, -1),
        llama(tokens),
        atol=2e-6,
    )


def test_padding_within_packed_documents_takes_no_position(tokens):
    config = dict(model_type="gpt2", vocab_size=64, n_embd=8, n_layer=1, n_head=2)
    gpt2 = models.build(config, jax.random.key(0))  # of absolute positions
    packed = tokens.reshape(1, 18)
    segments = np.repeat([[5, 2]], 9, axis=1)
    expected = gpt2(packed, segment_ids=segments)
    mask = np.ones((1, 22), int)
    mask[:, [0, 11, 12, 21]] = 0  # before, and first and last in a document
    real = mask[0] == 1
    spread, kinds = np.full((1, 22), 63), np.full((1, 22), 2)
    spread[:, real] = packed
    kinds[:, :11] = 5
    kinds[:, 11:] = 2
    kinds[:, real] = segments
    found = gpt2(spread, mask, segment_ids=kinds)
    np.testing.assert_allclose(found[:, real], expected, atol=2e-6)


def test_positions_begin_anew_at_the_first_real_token_of_a_document():
    mask = jnp.array([[1, 1, 0, 1, 1]])
    segments = jnp.array([[0, 0, 1, 1, 1]])
    found = positions.positions_of(mask, segments)
    np.testing.assert_array_equal(found, [[0, 1, 0, 0, 1]])


@pytest.mark.parametrize(
    "tokens, mask, extra, message",
    [
        (np.zeros(5, int), None, {}, r"\[batch, position\]"),
        (np.zeros((1, 5)), None, {}, "must be integers"),
        (np.full((1, 5), 64), None, {}, r"in \[0, 64\); got 64"),
        (np.full((1, 5), 2**32 + 3), None, {}, "must fit int32; got 4294967299"),
        (np.full((1, 5), -1), None, {}, r"in \[0, 64\); got -1"),
        (np.zeros((1, 33), int), None, {}, "33 positions; .* configured for 32"),
        (np.zeros((2, 0), int), None, {}, r"at least one of each; got shape \(2, 0\)"),
        (np.zeros((0, 5), int), None, {}, r"at least one of each; got shape \(0, 5\)"),
        (
            np.zeros((1, 5), int),
            np.ones((1, 4)),
            {},
            r"`attention_mask` must have .*, \(1, 5\); got \(1, 4\)",
        ),
        (
            np.zeros((3, 2), int),
            [[0, 1], [0, 0], [1, 1]],
            {},
            "real position in every row; row 1 has none",
        ),
        (
            np.zeros((1, 3), int),
            [[-np.inf, 0, 0]],
            {},
            "1 at real positions and 0 at padding; got -inf",
        ),
        (np.zeros((1, 5), int), None, {"dtype": "int8"}, "one of floats.*; got 'int8'"),
        (
            np.zeros((1, 5), int),
            None,
            {"segment_ids": np.zeros((5, 1), int)},
            "`segment_ids` must have",
        ),
        (
            np.zeros((1, 5), int),
            None,
            {"segment_ids": np.zeros((1, 5))},
            "`segment_ids` must be integers; got float",
        ),
    ],
)
def test_bad_inputs_are_named(llama, tokens, mask, extra, message):
    with pytest.raises(ValueError, match=message):
        llama(tokens, mask, **extra)


def test_values_that_are_traced_cannot_be_checked(llama):
    """As the docstring says: such a row means nothing, and is free of NaN."""
    tokens = np.zeros((2, 3), int)
    mask = np.array([[0, 0, 0], [0, 1, 1]])
    found = jax.jit(lambda mask: llama(tokens, mask))(mask)
    assert np.isfinite(found).all()
    alone = llama(tokens[1:], mask[1:])
    np.testing.assert_allclose(found[1, 1:], alone[0, 1:], atol=1e-6)


def test_ids_that_a_jitted_function_holds_are_checked(llama, tokens):
    ids = jnp.asarray(tokens)
    found = jax.jit(lambda scale: scale * llama(ids))(1.0)
    np.testing.assert_allclose(found, llama(ids), atol=1e-5)
    beyond = jnp.full_like(ids, 64)
    with pytest.raises(ValueError, match="got 64"):
        jax.jit(lambda scale: scale * llama(beyond))(1.0)


def test_bfloat16_products_with_float32_weights(llama, tokens):
    exact = llama(tokens)
    logits, cache = llama.run_with_cache(tokens, dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    assert cache["resid_post"].dtype == jnp.bfloat16
    # bfloat16 has 8 bits: 2**-8 of the logits' size, a few times over.
    size = np.abs(exact).max()
    np.testing.assert_allclose(logits, exact, atol=0.05 * size)

    def loss(llama):
        return llama(tokens, dtype=jnp.bfloat16).var()

    for _, gradient in nnx.to_flat_state(nnx.grad(loss)(llama)):
        assert gradient[...].dtype == jnp.float32


# Generation.


def test_generation_equals_the_whole_forward_pass(llama, tokens):
    found = np.asarray(models.generate(llama, tokens, max_new_tokens=8))
    np.testing.assert_array_equal(found[:, :9], tokens)
    logits = np.asarray(llama(found))
    np.testing.assert_array_equal(found[:, 9:], logits[:, 8:-1].argmax(-1))


def test_generation_with_padding_on_either_side(llama, tokens):
    plain = np.asarray(models.generate(llama, tokens, max_new_tokens=6))[:, 9:]
    junk, mask = np.full((2, 3), 7), np.ones((2, 12), int)
    mask[:, :3] = 0
    left = models.generate(llama, np.hstack([junk, tokens]), mask, max_new_tokens=6)
    np.testing.assert_array_equal(left[:, 12:], plain)
    right = models.generate(
        llama, np.hstack([tokens, junk]), mask[:, ::-1], max_new_tokens=6
    )
    np.testing.assert_array_equal(right[:, 12:], plain)


def test_a_sequence_ends_with_its_end_token(llama, tokens):
    plain = np.asarray(models.generate(llama, tokens, max_new_tokens=8))[:, 9:]
    end = int(plain[0, 3])
    found = np.asarray(models.generate(llama, tokens, max_new_tokens=8, eos_token=end))[
        :, 9:
    ]
    for row, free in zip(found, plain):
        first = list(free).index(end) if end in free else 8
        np.testing.assert_array_equal(row[:first], free[:first])
        assert (row[first:] == end).all()


def test_a_sequence_ends_with_the_first_of_several_end_tokens(llama, tokens):
    plain = np.asarray(models.generate(llama, tokens, max_new_tokens=8))[:, 9:]
    ends = [int(plain[0, 5]), int(plain[1, 2]), int(plain[0, 3])]
    found = models.generate(llama, tokens, max_new_tokens=8, eos_token=ends)
    for row, free in zip(np.asarray(found)[:, 9:], plain):
        first = int(np.flatnonzero(np.isin(free, ends))[0])
        np.testing.assert_array_equal(row[: first + 1], free[: first + 1])
        assert (row[first + 1 :] == ends[0]).all()


def test_a_generation_is_compiled_once_for_its_shapes(llama, tokens):
    def run(tokens, temperature, seed):
        knobs = dict(max_new_tokens=3, temperature=temperature, top_p=1 - temperature)
        return models.generate(llama, tokens, key=jax.random.key(seed), **knobs)

    run(tokens, 0.1, 0)
    compiled = generation._generate._cache_size()
    run(63 - tokens, 0.2, 1)
    assert generation._generate._cache_size() == compiled


def test_samples_follow_the_probabilities(llama):
    prompt = np.full((4000, 1), 3)
    share = np.asarray(jax.nn.softmax(llama(prompt[:1])[0, -1] * 20))

    def draws(top_p):
        found = models.generate(
            llama,
            prompt,
            max_new_tokens=1,
            temperature=0.05,
            top_p=top_p,
            key=jax.random.key(3),
        )
        return np.bincount(np.asarray(found)[:, -1], minlength=64) / 4000

    # Five standard deviations of a share of 4000 draws.
    np.testing.assert_allclose(draws(1.0), share, atol=5 * 0.5 / np.sqrt(4000))
    order = np.argsort(-share)
    nucleus = order[: np.searchsorted(np.cumsum(share[order]), 0.5) + 1]
    kept = np.zeros(64)
    kept[nucleus] = share[nucleus] / share[nucleus].sum()
    found = draws(0.5)
    assert (found[kept == 0] == 0).all()
    np.testing.assert_allclose(found, kept, atol=5 * 0.5 / np.sqrt(4000))


def test_the_nucleus_keeps_the_likeliest():
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    for top_p, kept in [(1e-9, [1]), (0.6, [1]), (0.61, [1, 2]), (1.0, [0, 1, 2])]:
        found = generation.nucleus(logits, top_p)
        assert list(np.flatnonzero(np.isfinite(found[0]))) == kept


@pytest.mark.parametrize(
    "knobs, message",
    [
        (dict(max_new_tokens=0), "at least 1"),
        (dict(max_new_tokens=24), "33 positions; .* configured for 32"),
        (dict(max_new_tokens=1, temperature=-1.0), "negative"),
        (dict(max_new_tokens=1, temperature=1.0), "needs a `key`"),
        (dict(max_new_tokens=1, top_p=0.0), r"\(0, 1\]"),
        (dict(max_new_tokens=1, eos_token=64), r"`eos_token` .* \[0, 64\); got 64"),
        (dict(max_new_tokens=1, eos_token=[1, -1]), "`eos_token` .* got -1"),
        (dict(max_new_tokens=1, eos_token=[]), "`eos_token` must be ids"),
        (dict(max_new_tokens=1, eos_token=1.5), "`eos_token` must be ids; got 1.5"),
        (dict(max_new_tokens=1, decoder_tokens=[[1]]), "encoder-decoders only"),
    ],
)
def test_bad_knobs_are_named(llama, tokens, knobs, message):
    with pytest.raises(ValueError, match=message):
        models.generate(llama, tokens, **knobs)


def test_there_must_be_something_to_continue(llama, tokens):
    with pytest.raises(ValueError, match="`tokens` must .* at least one of each"):
        models.generate(llama, tokens[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match="`attention_mask` .*; row 0 has none"):
        models.generate(llama, tokens, 0 * tokens, max_new_tokens=1)
    with pytest.raises(ValueError, match="`attention_mask` must have the shape"):
        models.generate(llama, tokens, np.ones((2, 8)), max_new_tokens=1)


# Reading and writing.


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    models.save(llama, path)
    return path


def rewritten(saved, path, *, config=None, tensors=None):
    """A copy of a checkpoint with other attributes or tensors (None: removed)."""
    from safetensors.numpy import load_file, save_file

    old = json.loads((saved / "config.json").read_text()) | (config or {})
    (path / "config.json").write_text(json.dumps(old))
    values = load_file(saved / "model.safetensors") | (tensors or {})
    values = {name: value for name, value in values.items() if value is not None}
    save_file(values, path / "model.safetensors")
    return path


def test_a_saved_model_comes_back_bit_for_bit(llama, saved, tokens):
    again = models.load(saved)
    for before, after in zip(
        nnx.to_flat_state(nnx.state(llama)), nnx.to_flat_state(nnx.state(again))
    ):
        assert before[0] == after[0]
        np.testing.assert_array_equal(before[1][...], after[1][...])
    assert again.config["hidden_size"] == 32


def test_large_models_are_saved_in_several_files(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "SHARD", 20000)
    models.save(llama, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0].startswith("model-00001-of-")
    for before, after in zip(
        jax.tree.leaves(nnx.state(llama)),
        jax.tree.leaves(nnx.state(models.load(tmp_path))),
    ):
        np.testing.assert_array_equal(before, after)


def test_a_save_leaves_no_weights_of_an_earlier_one(llama, tmp_path, monkeypatch):
    other = models.build(CONFIG, jax.random.key(1))
    (tmp_path / "model-of-mine.safetensors").touch()
    for model_saved, size in ((other, 2**30), (llama, 20000), (other, 40000)):
        monkeypatch.setattr(conversion, "SHARD", size)
        models.save(model_saved, tmp_path)
        again = nnx.state(models.load(tmp_path))
        for before, after in zip(
            jax.tree.leaves(nnx.state(model_saved)), jax.tree.leaves(again)
        ):
            np.testing.assert_array_equal(before, after)
        assert len({path.name[12:] for path in tmp_path.glob("model-0*")}) <= 1
    monkeypatch.setattr(conversion, "SHARD", 2**30)
    models.save(llama, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.json", "model.safetensors", "model-of-mine.safetensors"}


@pytest.mark.parametrize(
    "config, name",
    [
        (
            dict(model_type="gpt2", vocab_size=20, n_embd=8, n_layer=1, n_head=2),
            "transformer.h.0.attn.c_attn.weight",
        ),
        (
            dict(
                model_type="gpt_neox",
                vocab_size=20,
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=1,
                num_attention_heads=2,
                rotary_pct=0.5,
            ),
            "gpt_neox.layers.0.attention.query_key_value.weight",
        ),
    ],
)
def test_a_transposed_fused_tensor_is_refused(tmp_path, config, name):
    from safetensors.numpy import load_file

    models.save(models.build(config, jax.random.key(0)), tmp_path)
    turned = load_file(tmp_path / "model.safetensors")[name].T.copy()
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[{turned.shape[0]}"):
        models.load(rewritten(tmp_path, tmp_path, tensors={name: turned}))


def test_it_is_cast_while_it_is_read(llama, saved):
    for dtype in (jnp.bfloat16, jnp.float16):
        found = nnx.to_flat_state(nnx.state(models.load(saved, dtype=dtype)))
        for (path, before), (_, after) in zip(
            nnx.to_flat_state(nnx.state(llama)), found
        ):
            assert after[...].dtype == dtype, path
            np.testing.assert_array_equal(before[...].astype(dtype), after[...])


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "half-float"])
def test_parameters_are_floats(saved, dtype):
    with pytest.raises(ValueError, match=f"`dtype` must be one of floats.*'{dtype}'"):
        models.load(saved, dtype=dtype)
    with pytest.raises(ValueError, match="`dtype` must be one of floats"):
        models.build(CONFIG, jax.random.key(0), dtype=dtype)


def test_float64_is_never_quietly_less(saved):
    with pytest.raises(ValueError, match="jax_enable_x64"):
        models.load(saved, dtype="float64")


def test_files_of_several_dtypes_are_read_into_one_that_holds_all(
    llama, saved, tmp_path, tokens
):
    half = models.load(saved, dtype="bfloat16")
    models.save(half, tmp_path)
    wide = {
        f"model.layers.{layer}.mlp.down_proj.weight": np.asarray(kernel.T, np.float32)
        for layer, kernel in enumerate(llama.decoder.blocks.mlp.down.kernel[...])
    }
    found = models.load(rewritten(tmp_path, tmp_path, tensors=wide))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    assert np.isfinite(found(tokens)).all()


def test_bfloat16_is_saved_as_it_is(llama, saved, tmp_path):
    half = models.load(saved, dtype="bfloat16")
    models.save(half, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = nnx.state(models.load(tmp_path))
    for (_, before), (_, after) in zip(
        nnx.to_flat_state(nnx.state(half)), nnx.to_flat_state(again)
    ):
        assert after[...].dtype == jnp.bfloat16
        np.testing.assert_array_equal(before[...], after[...])


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({LAYER: None}, f"missing tensors: {LAYER}"),
        ({"model.extra.weight": np.zeros(3)}, "unknown tensors: model.extra.weight"),
        ({"x" + LAYER: np.zeros((48, 32))}, f"unknown tensors: x{LAYER}"),
        (
            {"model.layers.4.mlp.up_proj.weight": np.zeros((48, 32))},
            "unknown tensors: model.layers.4.mlp.up_proj.weight",
        ),
        ({LAYER: np.zeros((32, 48))}, rf"{LAYER} has shape \[32, 48\]"),
        (
            {"model.embed_tokens.weight": np.zeros(64 * 32)},
            r"embed_tokens.weight has shape \[2048\]",
        ),
        ({LAYER: np.zeros((48, 33))}, r"shape \[48, 33\]"),
        ({LAYER: np.zeros((48, 32), np.int8)}, f"{LAYER} holds int8"),
        ({LAYER[6:]: np.zeros((48, 32))}, "are the same"),
        (
            {LAYER: None, "odd": np.zeros(2), "model.norm.weight": np.zeros(31)},
            "unknown tensors: odd; missing tensors: .*; tensors that do not fit",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(saved, tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        models.load(rewritten(saved, tmp_path, tensors=tensors))


def test_prefixes_and_known_extras_are_rules(llama, saved, tmp_path, tokens):
    from safetensors.numpy import load_file

    bare = {}
    for name, value in load_file(saved / "model.safetensors").items():
        bare |= {name: None, name.removeprefix("model."): value}
    bare["lm_head.weight"] = bare["embed_tokens.weight"].copy()  # tied, and stored
    bare["score.weight"] = np.zeros((2, 32), np.float32)  # a classifier's
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    again = models.load(rewritten(saved, tmp_path, tensors=bare))
    assert again.unembedding is None  # stored twice, kept once
    np.testing.assert_array_equal(again(tokens), llama(tokens))


def test_an_unembedding_of_other_values_is_kept(saved, tmp_path):
    """Whatever the config says of ties: so does transformers."""
    other = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    path = rewritten(saved, tmp_path, tensors={"lm_head.weight": other})
    np.testing.assert_array_equal(models.load(path).unembed_matrix, other)
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \[63, 32\]"):
        models.load(rewritten(saved, tmp_path, tensors={"lm_head.weight": other[1:]}))
    with pytest.raises(CheckpointError, match="missing tensors: lm_head.weight"):
        models.load(rewritten(saved, tmp_path, config={"tie_word_embeddings": False}))


def test_a_decoder_is_headless_where_its_config_says_so(
    saved, llama, everything, tokens, tmp_path
):
    said = {"architectures": ["LlamaModel"], "tie_word_embeddings": False}
    headless = models.load(rewritten(saved, tmp_path, config=said))
    last = everything[1]["ln_final.hook_normalized"]
    np.testing.assert_allclose(headless(tokens), last, atol=1e-6)
    with pytest.raises(ValueError, match="without a head: it has no logits"):
        headless.unembed(last)
    with pytest.raises(ValueError, match="without a head does not generate"):
        models.generate(headless, tokens, max_new_tokens=1)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "rwkv"}, "model_type 'rwkv' is none"),
        ({"model_type": None}, "no config.json, or one without a model_type"),
        ({"residual_scale": 0.5}, "residual_scale = 0.5 is not handled"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"hidden_act": "mish"}, "activation 'mish' is not handled"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        (
            {"rope_parameters": {"rope_type": "default", "twist": 2}},
            r"rope parameters \['twist'\]",
        ),
        ({"vocab_size": 65}, r"embed_tokens.weight has shape \[64, 32\]"),
        ({"num_hidden_layers": 10**8}, "100000000"),
    ],
)
def test_what_is_not_handled_is_named(saved, tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        models.load(rewritten(saved, tmp_path, config=config))


def test_old_and_new_spellings_are_one(saved, tmp_path, tokens):
    scaled = dict(
        factor=2.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )
    old = dict(
        rope_theta=777.0,
        rope_scaling=scaled | {"type": "llama3"},
        torch_dtype="bfloat16",
    )
    new = dict(rope_parameters=scaled | {"rope_type": "llama3", "rope_theta": 777.0})
    found = []
    for index, config in enumerate((old, new)):
        (path := tmp_path / str(index)).mkdir()
        found.append(models.load(rewritten(saved, path, config=config)))
    np.testing.assert_array_equal(found[0](tokens), found[1](tokens))
    assert found[0].spec == found[1].spec


def test_with_a_mesh_each_device_holds_its_shard_only(saved, llama, tokens):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))
    spread = models.load(saved, mesh=mesh)
    split = 0
    for (path, before), (_, after) in zip(
        nnx.to_flat_state(nnx.state(llama)), nnx.to_flat_state(nnx.state(spread))
    ):
        value = after[...]
        np.testing.assert_array_equal(value, before[...])
        shards = value.addressable_shards
        assert len(shards) == 8
        if any(n % 8 == 0 for n in value.shape["blocks" in path :]):
            assert shards[0].data.size * 8 == value.size, path
            split += 1
    assert split > 10
    np.testing.assert_allclose(spread(tokens), llama(tokens), atol=2e-6)


def test_with_a_mesh_only_the_slices_of_a_shard_are_read(saved, monkeypatch):
    """A whole parameter is never in memory: its shards are filled one by one."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("model",))
    shape = (4, 32, 48)
    sharding = conversion.sharding(shape, {0: None}, mesh)
    assert sharding.shard_shape(shape) == (4, 32, 6)
    assert conversion.sharding((3, 5), {None: None}, mesh).shard_shape((3, 5)) == (3, 5)
    made, aligned = [], conversion.aligned

    def counted(shape, dtype):
        made.append(tuple(shape))
        return aligned(shape, dtype)

    monkeypatch.setattr(conversion, "aligned", counted)
    models.load(saved, mesh=mesh)
    assert made.count((4, 32, 6)) == 16  # gate and up, on 8 devices
    assert (4, 32, 48) not in made and (64, 32) not in made


MEASURE = """
    import ctypes, sys, threading
    import jax, jax.numpy as jnp
    from jaxling import models

    def anonymous():
        for line in open("/proc/self/smaps_rollup"):
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024

    jax.devices(), jnp.zeros(3) + 1
    before, peak, done = anonymous(), 0, False

    def watch():
        global peak
        while not done:
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = models.load(sys.argv[1], dtype=sys.argv[2])
    jax.block_until_ready(jax.tree.leaves(model))
    done = True
    watcher.join()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(model)]
    print(peak - before, sum(sizes), max(sizes))
"""


def rise(path, dtype):
    """Rise of anonymous memory while loading, and what it may be at most."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(path), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={**__import__("os").environ, "XLA_FLAGS": ""},
    ).stdout.split()
    peak, total, largest = map(int, found)
    return peak, 1.3 * total + largest


def write_large(path, layers):
    """A checkpoint of about 34 MB a layer, written without holding it."""
    config = CONFIG | dict(
        hidden_size=1024,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=4096,
    )
    models.save(models.build(config, jax.random.key(0)), path)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_little_more_than_the_parameters(tmp_path, dtype):
    assert write_large(tmp_path, 5) > 180e6
    peak, limit = rise(tmp_path, dtype)
    assert peak <= limit


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_two_gibibytes_takes_little_more(tmp_path, dtype):
    assert write_large(tmp_path, 60) > 2**31
    peak, limit = rise(tmp_path, dtype)
    assert peak <= limit


# Training.


def test_a_small_model_learns(tokens):
    """Plain gradient steps lower the loss of a model built from scratch."""
    llama = models.build(CONFIG | {"num_hidden_layers": 2}, jax.random.key(0))

    def loss(llama):
        logits = jax.nn.log_softmax(llama(tokens)[:, :-1])
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()

    @jax.jit
    def step(parameters):
        value, gradient = jax.value_and_grad(
            lambda parameters: loss(nnx.merge(graph, parameters))
        )(parameters)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, parameters, gradient)

    graph, parameters = nnx.split(llama)
    first, parameters = step(parameters)
    for _ in range(30):
        last, parameters = step(parameters)
    np.testing.assert_allclose(first, np.log(64), atol=0.1)
    assert last < 0.5 * first
