"""Maps of an embedding: planted axes, planted groups, bad rows."""

import sys

import numpy as np
import pytest

from jaxling import maps, neighborhoods


def planted(rng, n=600, d=12):
    """Unit rows around a mean, spread along two known orthogonal axes."""
    axes = np.linalg.qr(rng.normal(size=(d, 3)))[0]
    along = rng.normal(size=(n, 2)) * [0.3, 0.1]
    x = axes[:, 2] + along @ axes[:, :2].T
    return x.astype(np.float32), axes


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("block", [7, 10_000])
def test_components_match_a_singular_value_decomposition(rng, monkeypatch, block):
    monkeypatch.setattr(maps, "_BLOCK", block)
    x, _ = planted(rng)
    found = maps.principal_components(x, count=3)
    centred = unit(x) - unit(x).mean(axis=0)
    u, s, v = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(v[np.arange(3), np.abs(v[:3]).argmax(axis=1)])
    # float32 products of 600 unit rows round to about 1e-6 of the largest variance
    expected = u[:, :3] * s[:3] * signs
    np.testing.assert_allclose(found.coordinates, expected, atol=2e-4)
    np.testing.assert_allclose(found.explained, s[:3] ** 2 / (s**2).sum(), atol=1e-5)
    assert found.coordinates.dtype == np.float32


def test_the_planted_axes_are_found(rng):
    x, _ = planted(rng)
    found = maps.principal_components(x)
    assert found.explained.sum() > 0.95 and found.explained[0] > 0.75


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_and_zero_rows(rng, dtype):
    x, _ = planted(rng)
    x[5] = 0
    found = maps.principal_components(x.astype(dtype)).coordinates
    expected = maps.principal_components(x).coordinates
    # a float16 entry is off by up to 2^-11 of itself
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert np.isfinite(found).all()


def test_variance_between_labels_is_a_share(rng, monkeypatch):
    monkeypatch.setattr(maps, "_BLOCK", 64)
    x = rng.normal(size=(300, 8))
    names = rng.choice(["a", "b", "c"], 300)
    labels = neighborhoods.encode(names.tolist())
    y = unit(x)
    means = np.stack([y[names == name].mean(axis=0) for name in names])
    expected = ((means - y.mean(0)) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    np.testing.assert_allclose(
        maps.variance_between(x, labels).share, expected, rtol=1e-5
    )
    parted = np.eye(8)[labels.codes] * rng.uniform(1, 2, (300, 1))
    np.testing.assert_allclose(
        maps.variance_between(parted, labels).share, 1, rtol=1e-6
    )
    alone = neighborhoods.encode(["a"] * 300)
    assert maps.variance_between(x, alone) == (pytest.approx(0, abs=1e-6), 0)
    assert maps.variance_between(np.ones((300, 8)), labels).share == 0
    shuffled = [
        maps.variance_between(x, labels._replace(codes=rng.permutation(labels.codes)))
        for _ in range(100)
    ]
    shares = [found.share for found in shuffled]
    # the mean of 100 shares with this deviation is within four standard errors
    error = 4 * np.std(shares) / 10
    assert abs(np.mean(shares) - shuffled[0].chance) < error and error < 0.001


def test_rows_that_are_not_numbers_are_named(rng):
    x, _ = planted(rng)
    x[77, 3] = np.inf
    with pytest.raises(ValueError, match="Row 77"):
        maps.principal_components(x)
    with pytest.raises(ValueError, match="two rows"):
        maps.principal_components(x[:1])


def test_umap_without_the_package_names_the_extra(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"pip install jaxling\[umap\]"):
        maps.umap_map(planted(rng)[0], seed=0)


def test_umap_parts_groups_and_repeats_itself(rng):
    pytest.importorskip("umap")
    centres = np.eye(8)[rng.integers(0, 2, 120)]
    x = centres + 0.05 * rng.normal(size=(120, 8))
    first, second = maps.umap_map(x, seed=3), maps.umap_map(x, seed=3)
    np.testing.assert_array_equal(first, second)
    group = centres[:, 0] > 0
    labels = neighborhoods.encode([str(g) for g in group])
    centred = first - first.mean(axis=0)
    means = np.stack([centred[labels.codes == c].mean(axis=0) for c in labels.codes])
    assert (means**2).sum() > 0.8 * (centred**2).sum()
    with pytest.raises(ValueError, match="at least 17 rows"):
        maps.umap_map(x[:16], seed=0)
