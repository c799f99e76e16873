"""The lens kernel against dense float64 logits."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxling import kernels
from jaxling.kernels import layer_tiles

SCALARS = ("log_sum_exp", "entropy", "kl_to_final", "target_log_probs", "group_mass")


def lens_oracle(hidden, unembed, bias=0, targets=None, groups=None, softcap=None):
    """Every quantity from the full logits, in float64."""
    logits = np.einsum("lnd,vd->lnv", *(x.astype("d") for x in (hidden, unembed)))
    logits = logits + bias
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    log_p = logits - log_sum[..., None]
    p = np.exp(log_p)
    order = np.argsort(-logits, -1, kind="stable")
    found = {
        "log_sum_exp": log_sum,
        "entropy": -(p * log_p).sum(-1),
        "kl_to_final": (p[-1] * (log_p[-1] - log_p)).sum(-1),
        "top_tokens": order,
        "agrees": order[..., 0] == order[-1, :, 0],
    }
    if targets is not None:
        targets = targets.reshape(len(targets), -1)
        shape = (*logits.shape[:2], targets.shape[1])
        own = np.take_along_axis(logits, np.broadcast_to(targets, shape), -1)
        found["target_log_probs"] = own - log_sum[..., None]
        above = logits[..., None] > own[:, :, None]
        found["target_ranks"] = above.sum(-2)
    if groups is not None:
        found["group_mass"] = p @ groups.T.astype("d")
    return found


def agrees(found, expected, k, atol):
    for name in SCALARS:
        if name in expected:
            np.testing.assert_allclose(getattr(found, name), expected[name], atol=atol)
    np.testing.assert_array_equal(found.top_tokens, expected["top_tokens"][..., :k])
    np.testing.assert_array_equal(found.agrees, expected["agrees"])
    if "target_ranks" in expected:
        np.testing.assert_array_equal(found.target_ranks, expected["target_ranks"])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "layers, n, vocab, tile, block",
    [(3, 37, 1000, 256, 8), (3, 37, 1000, 100, 64), (1, 1, 33, 4096, None)],
)
def test_every_quantity_matches_the_dense_oracle(
    rng, layers, n, vocab, tile, block, traced
):
    hidden = rng.normal(size=(layers, n, 32)).astype("f")
    unembed = rng.normal(size=(vocab, 32)).astype("f")
    bias = rng.normal(size=vocab).astype("f")
    targets = rng.integers(0, vocab, (n, 2))
    groups = (rng.random((3, vocab)) < 0.3).astype("f")
    options = dict(k=5, entropy=True, divergence=True, tile=tile, block=block)
    call = functools.partial(kernels.project_layers, **options)
    if traced:
        call = jax.jit(call)
    found = call(hidden, unembed, bias=bias, targets=targets, groups=groups)
    # Logits near 20 summed in float32: 1e-6 of that, over a thousand terms.
    agrees(found, lens_oracle(hidden, unembed, bias, targets, groups), 5, 5e-5)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_accumulated_in_float32(rng, dtype):
    # The oracle sees the rounded inputs, so the tolerance is that of float32.
    hidden = rng.normal(size=(2, 9, 64)).astype(dtype)
    unembed = rng.normal(size=(500, 64)).astype(dtype)
    targets = rng.integers(0, 500, 9)
    found = kernels.project_layers(
        hidden, unembed, k=4, entropy=True, divergence=True, targets=targets, tile=128
    )
    assert found.log_sum_exp.dtype == np.float32
    agrees(found, lens_oracle(hidden, unembed, 0, targets), 4, 5e-5)


def test_a_softcap_bounds_the_logits(rng):
    hidden = 9 * rng.normal(size=(2, 9, 16)).astype("f")
    unembed = rng.normal(size=(300, 16)).astype("f")
    found = kernels.project_layers(
        hidden, unembed, softcap=5.0, k=1, entropy=True, divergence=True, tile=64
    )
    expected = lens_oracle(hidden, unembed, softcap=5.0)
    # Saturated logits tie in float32 alone, so the first of them is not compared.
    for name in SCALARS[:3]:
        np.testing.assert_allclose(getattr(found, name), expected[name], atol=5e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("vocab, tile", [(1000, 128), (999, 100)])
def test_copies_of_the_target_are_not_above_it(rng, vocab, tile, dtype):
    """Equal rows in other tiles and other places of a tile tie, and never outrank."""
    hidden = rng.normal(size=(3, 21, 96)).astype(dtype)
    unembed = rng.normal(size=(vocab, 96)).astype(dtype)
    copies = rng.permutation(vocab)[:300].reshape(30, 10)
    unembed[copies] = unembed[copies[:, :1]]
    targets = rng.choice(copies.ravel(), 21)
    found = kernels.project_layers(
        hidden, unembed, k=30, targets=targets, tile=tile, block=8
    )
    logits = np.einsum("lnd,vd->lnv", *(x.astype("d") for x in (hidden, unembed)))
    own = logits[:, np.arange(21), targets]
    np.testing.assert_array_equal(
        np.asarray(found.target_ranks)[..., 0], (logits > own[..., None]).sum(-1)
    )
    # Among equals the lower id comes first.
    expected = np.argsort(-logits, -1, kind="stable")[..., :30]
    np.testing.assert_array_equal(found.top_tokens, expected)


def test_all_tokens_equal(rng):
    unembed = np.ones((70, 8), np.float32)
    found = kernels.project_layers(
        rng.normal(size=(2, 3, 8)),
        unembed,
        k=3,
        entropy=True,
        targets=np.array([5, 69, -1]),
    )
    np.testing.assert_array_equal(
        found.top_tokens, np.broadcast_to(range(3), (2, 3, 3))
    )
    np.testing.assert_allclose(found.entropy, np.log(70), atol=1e-5)
    np.testing.assert_array_equal(found.target_ranks[..., 0], [[0, 0, -1]] * 2)
    assert np.isnan(found.target_log_probs[:, 2]).all()


def test_rows_that_are_no_numbers_say_nothing_and_harm_no_other(rng):
    hidden = rng.normal(size=(3, 12, 16)).astype("f")
    unembed = rng.normal(size=(200, 16)).astype("f")
    options = dict(k=3, entropy=True, divergence=True, targets=np.arange(12), tile=64)
    clean = kernels.project_layers(hidden, unembed, **options)
    hidden[0, 4, 7], hidden[1, 5, 0], hidden[2, 6] = np.nan, np.inf, np.nan
    found = kernels.project_layers(hidden, unembed, **options)
    bad = np.zeros((3, 12), bool)
    bad[[0, 1, 2], [4, 5, 6]] = True
    for name, before, after in zip(found._fields, clean, found):
        if before is None:
            continue
        before, after = np.array(before), np.array(after)
        if name in ("kl_to_final", "agrees"):  # those of position 6 ask the last layer
            before, after = np.delete(before, 6, 1), np.delete(after, 6, 1)
        mine = bad[:, np.r_[:6, 7:12]] if before.shape[1] == 11 else bad
        np.testing.assert_array_equal(after[~mine], before[~mine])
        wrong = {"top_tokens": -1, "target_ranks": -1, "agrees": False}.get(
            name, np.nan
        )
        np.testing.assert_array_equal(after[mine], np.full_like(after[mine], wrong))


@pytest.mark.parametrize("scale", [1e-20, 1e3])
def test_tiny_and_huge_rows(rng, scale):
    hidden = (scale * rng.normal(size=(2, 5, 16))).astype("f")
    unembed = rng.normal(size=(100, 16)).astype("f")
    found = kernels.project_layers(hidden, unembed, entropy=True, divergence=True)
    expected = lens_oracle(hidden, unembed)
    for name in SCALARS[:3]:
        # Logits up to 1e4 have float32 steps of 1e-3.
        atol = 1e-5 if scale < 1 else 5e-3
        np.testing.assert_allclose(getattr(found, name), expected[name], atol=atol)


def test_a_traced_target_beyond_the_vocabulary_is_none(rng):
    hidden, unembed = rng.normal(size=(2, 3, 8)), rng.normal(size=(40, 8))
    found = jax.jit(lambda t: kernels.project_layers(hidden, unembed, targets=t))(
        jnp.array([39, 40, 7])
    )
    assert np.isnan(found.target_log_probs)[..., 0].tolist() == [[0, 1, 0]] * 2
    assert (np.asarray(found.target_ranks)[:, 1] == -1).all()


def test_only_what_is_asked_for_is_made(rng):
    hidden, unembed = rng.normal(size=(2, 3, 8)), rng.normal(size=(40, 8))
    found = kernels.project_layers(hidden, unembed)
    assert [name for name, value in found._asdict().items() if value is not None] == [
        "log_sum_exp"
    ]
    empty = kernels.project_layers(hidden[:, :0], unembed, k=2, entropy=True)
    assert empty.entropy.shape == (2, 0) and empty.top_tokens.shape == (2, 0, 2)


def test_a_transform_with_parameters_compiles_once(rng):
    def scaled(scale, hidden):
        return hidden * scale

    hidden = rng.normal(size=(2, 7, 8)).astype("f")
    unembed = rng.normal(size=(100, 8)).astype("f")
    project = functools.partial(
        kernels.project_layers, hidden, unembed, entropy=True, tile=32, block=3
    )
    partial = jax.tree_util.Partial(scaled, jnp.float32(1))
    project(transform=partial)
    steps = layer_tiles.prepared, layer_tiles.advanced, layer_tiles.finished
    before = [step._cache_size() for step in steps]
    found = project(transform=jax.tree_util.Partial(scaled, jnp.float32(3)))
    assert [step._cache_size() for step in steps] == before
    expected = lens_oracle(3 * hidden, unembed)
    np.testing.assert_allclose(found.entropy, expected["entropy"], atol=5e-5)


def test_gradients_are_those_of_the_dense_formula(rng):
    """To hidden states, to a transform's parameters and to the bias."""
    hidden = jnp.asarray(rng.normal(size=(3, 6, 12)), jnp.float32)
    unembed = jnp.asarray(rng.normal(size=(90, 12)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=90), jnp.float32)
    matrix = jnp.asarray(rng.normal(size=(12, 12)), jnp.float32)
    targets = rng.integers(0, 90, 6)
    groups = (rng.random((2, 90)) < 0.4).astype("f")
    turned = lambda m, h: jnp.einsum("lnd,de->lne", h, m, precision="highest")  # noqa

    def total(lse, kl, entropy, own, mass, top):
        sums = lse.sum() + 2 * kl.sum() - entropy.sum() + (own**2).sum() + mass.sum()
        return sums + (top**2).sum()

    def sparse(hidden, matrix, bias):
        found = kernels.project_layers(
            *(hidden, unembed),
            **dict(transform=jax.tree_util.Partial(turned, matrix), bias=bias),
            **dict(targets=targets, groups=groups, entropy=True, divergence=True),
            **dict(softcap=20.0, k=3, tile=32, block=4),
        )
        return total(
            found.log_sum_exp,
            found.kl_to_final,
            found.entropy,
            found.target_log_probs,
            found.group_mass,
            found.top_log_probs,
        )

    def dense(hidden, matrix, bias):
        x = turned(matrix, hidden)
        logits = jnp.einsum("lnd,vd->lnv", x, unembed, precision="highest") + bias
        logits = 20 * jnp.tanh(logits / 20)
        log_p = jax.nn.log_softmax(logits)
        p = jnp.exp(log_p)
        return total(
            jax.nn.logsumexp(logits, -1),
            (p[-1] * (log_p[-1] - log_p))[:-1].sum(-1),
            -(p * log_p).sum(-1),
            log_p[:, np.arange(6), targets],
            p @ groups.T,
            jax.lax.top_k(log_p, 3)[0],
        )

    found = jax.grad(sparse, (0, 1, 2))(hidden, matrix, bias)
    expected = jax.grad(dense, (0, 1, 2))(hidden, matrix, bias)
    for ours, theirs in zip(found, expected):
        # Sums of a few hundred float32 products.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_memory_is_a_few_tiles_whatever_the_vocabulary():
    def temporaries(vocab, gradient):
        shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

        def loss(hidden, unembed, targets):
            return kernels.project_layers(
                *(hidden, unembed),
                **dict(k=5, entropy=True, divergence=True, targets=targets),
                **dict(tile=512, block=16),
            )

        def summed(*x):
            return loss(*x).kl_to_final.sum()

        call = jax.jit(jax.grad(summed) if gradient else loss)
        targets = jax.ShapeDtypeStruct((64,), jnp.int32)
        lowered = call.lower(shape((4, 64, 32)), shape((vocab, 32)), targets)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    tile = 512 * 4 * 16 * 4
    dense = 4 * 64 * 32768 * 4
    small, large = (temporaries(v, gradient=False) for v in (4096, 32768))
    assert large < 1.1 * small and large < 16 * tile
    # The gradient has the matrix once more, and a carry for each tile of it.
    assert temporaries(32768, gradient=True) < 24 * tile + 32768 * 32 * 4 < dense / 4


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden=np.zeros((3, 4))), r"`hidden` must be \[layer, n, d\]"),
        (dict(unembed=np.zeros((0, 4))), "`unembed`"),
        (dict(unembed=np.zeros((9, 5))), "4 columns"),
        (dict(unembed=np.ones((9, 4), int)), "must be floating"),
        (dict(k=10), r"`k` must be in \[0, 9\]"),
        (dict(tile=0), "`tile` and `block`"),
        (dict(block=0), "`tile` and `block`"),
        (dict(bias=np.zeros(3)), r"`bias` must be \[9\]"),
        (dict(targets=np.zeros(3)), "token ids"),
        (dict(targets=np.zeros(4, int)), r"\[3\] or \[3, t\]; got \(4,\)"),
        (dict(targets=np.array([1, 9, 2])), "below 9"),
        (dict(groups=np.zeros((2, 8))), r"`groups` must be \[g, 9\]"),
    ],
)
def test_the_door_says_what_does_not_fit(change, words):
    inputs = dict(hidden=np.zeros((2, 3, 4)), unembed=np.zeros((9, 4))) | change
    with pytest.raises(ValueError, match=words):
        kernels.project_layers(**inputs)
