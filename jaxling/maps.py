"""Two-dimensional maps of an embedding, and how far labels part it.

Rows are brought to unit length first, as Hyperpolyglot LLMs does. Matrices may be
memory-mapped: principal components read them a block at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxling.neighborhoods import Labels

FEWEST_FOR_UMAP = 17  # rows: one more than 15 neighbours and the row itself
_BLOCK = 8_192  # rows in memory at a time


class PrincipalComponents(NamedTuple):
    """Coordinates `[n, count]` float32 and each axis's share of the variance.

    The entry of largest magnitude of every axis is positive, so that a map is the same
    from run to run.
    """

    coordinates: np.ndarray
    explained: np.ndarray


def principal_components(x: np.ndarray, *, count: int = 2) -> PrincipalComponents:
    """The axes of greatest variance of the unit rows of `x` `[n, d]`.

    Eigenvectors of the covariance, summed in float64.

    Raises:
      ValueError: fewer than two rows, fewer dimensions than `count`, or a row that is
        not finite.
    """
    n, d = x.shape
    if n < 2 or not 1 <= count <= d:
        raise ValueError(
            f"`x` must have two rows and `count` = {count} dimensions; got {x.shape}."
        )
    total, products = np.zeros(d), np.zeros((d, d))
    for block in _unit_blocks(x):
        total += block.sum(axis=0, dtype=np.float64)
        products += (block.T @ block).astype(np.float64)
    mean = total / n
    values, vectors = np.linalg.eigh(products / n - np.outer(mean, mean))
    axes = vectors[:, ::-1][:, :count]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, np.arange(count)] < 0, -1, 1)
    coordinates = [(block - mean) @ axes for block in _unit_blocks(x)]
    spread = max(values.sum(), np.finfo(np.float64).tiny)
    return PrincipalComponents(
        np.concatenate(coordinates).astype(np.float32),
        np.maximum(values[::-1][:count], 0) / spread,
    )


class VarianceBetween(NamedTuple):
    """A share of variance, and its expectation under labels drawn at random."""

    share: float
    chance: float


def variance_between(x: np.ndarray, labels: Labels) -> VarianceBetween:
    """The share of the unit rows' variance that lies between the labels' means.

        sum over labels of n_l |mean_l - mean|^2 / sum over rows of |x_i - mean|^2

    (the squared correlation ratio), 1 where labels say all. Labels shuffled at random
    reach (labels - 1) / (n - 1) on average.
    """
    n, d = x.shape
    sums, squares, start = np.zeros((len(labels.names), d)), 0.0, 0
    for block in _unit_blocks(x):
        np.add.at(sums, labels.codes[start : start + len(block)], block)
        squares += float((block.astype(np.float64) ** 2).sum())
        start += len(block)
    counts = np.bincount(labels.codes, minlength=len(labels.names))
    centre = (sums.sum(axis=0) ** 2).sum() / n
    between = ((sums**2).sum(axis=1) / np.maximum(counts, 1)).sum() - centre
    everything = squares - centre
    chance = (np.count_nonzero(counts) - 1) / max(n - 1, 1)
    share = between / everything if everything > n * np.finfo(np.float32).eps else 0.0
    return VarianceBetween(float(share), float(chance))


def umap_map(x: np.ndarray, *, seed: int) -> np.ndarray:
    """UMAP of the unit rows of `x`, float32 `[n, 2]`, with the paper's settings.

    15 neighbours, minimal distance 0.2, Euclidean. The paper set no seed; here one is
    set, so that a map can be made again (by one thread).

    McInnes et al., 2018, https://arxiv.org/abs/1802.03426; Wen-Yi and Mimno, 2023,
    https://arxiv.org/abs/2311.18034, figure 1.

    Raises:
      ImportError: umap-learn is not installed.
      ValueError: fewer than 17 rows, or a row that is not finite.
    """
    try:
        import umap
    except ImportError as error:
        raise ImportError(
            "UMAP maps need umap-learn: pip install jaxling[umap]"
        ) from error
    if len(x) < FEWEST_FOR_UMAP:
        raise ValueError(
            f"`x` must have at least {FEWEST_FOR_UMAP} rows; got {len(x)}."
        )
    mapping = umap.UMAP(
        n_neighbors=15,
        min_dist=0.2,
        n_components=2,
        metric="euclidean",
        random_state=seed,
        n_jobs=1,
    )
    return mapping.fit_transform(np.concatenate([*_unit_blocks(x)])).astype(np.float32)


def _unit_blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """The rows at unit length, float32; rows of zeros stay zeros."""
    for start in range(0, len(x), _BLOCK):
        block = np.asarray(x[start : start + _BLOCK]).astype(np.float32)
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"Row {start + int(np.argmin(finite))} of `x` must be finite."
            )
        norms = np.linalg.norm(block, axis=1, keepdims=True)
        yield block / np.where(norms > 0, norms, 1)
