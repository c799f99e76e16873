"""How well many classifiers do: predictions and their scores, batched.

In every function a label of -1 marks a row that does not count. Scores over no rows,
and those that need a class which is absent, are NaN.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from . import batching
from .logistic import check_finite
from .problems import Problems, check_labels


class Scores(NamedTuple):
    """Scores of `p` problems on their rows, with a leading `layer` axis where given.

    `rows` counts the rows; `auc` is NaN for more than two classes.
    """

    rows: Array | np.ndarray
    accuracy: Array | np.ndarray
    balanced_accuracy: Array | np.ndarray
    f1: Array | np.ndarray
    auc: Array | np.ndarray


def decision(
    x: ArrayLike, weights: ArrayLike, intercepts: ArrayLike
) -> Float[Array, "*p n"]:
    """Margins `x w + b` of every row under every problem.

    `x` `[n, d]`, `weights` `[p, d]` or `[p, classes, d]`, `intercepts` accordingly:
    `[p, n]` or `[p, classes, n]`, in float32. Above 0 is class 1.

    Raises:
      ValueError: shapes do not fit.
    """
    x, weights = jnp.asarray(x), jnp.asarray(weights)
    intercepts = jnp.asarray(intercepts)
    if x.ndim != 2:
        raise ValueError(f"`x` must be [n, d]; got shape {x.shape}.")
    d = x.shape[1]
    if weights.ndim not in (2, 3) or weights.shape[-1] != d:
        raise ValueError(
            f"`weights` must be [p, d] or [p, classes, d] with d = {d};"
            f" got shape {weights.shape}."
        )
    if intercepts.shape != weights.shape[:-1]:
        raise ValueError(
            f"`intercepts` must be {list(weights.shape[:-1])}, one for each vector of"
            f" `weights`; got shape {intercepts.shape}."
        )
    margins = jnp.matmul(
        weights,
        x.T,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return margins + intercepts[..., None]


def predict(x: ArrayLike, weights: ArrayLike, intercepts: ArrayLike) -> Array:
    """The class `[p, n]` int32 that each problem gives each row; see `decision`."""
    margins = decision(x, weights, intercepts)
    if jnp.ndim(weights) == 2:
        return (margins > 0).astype(jnp.int32)
    return jnp.argmax(margins, axis=-2).astype(jnp.int32)


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> Array:
    """Share of the rows `[..., n]` whose prediction is the label: `[...]`."""
    predicted, labels = jnp.asarray(predicted), jnp.asarray(labels)
    counted = labels >= 0
    right = jnp.sum((predicted == labels) & counted, axis=-1)
    return right / jnp.sum(counted, axis=-1)


def balanced_accuracy(
    predicted: ArrayLike, labels: ArrayLike, *, classes: int = 2
) -> Array:
    """Mean over the classes present of the share of their rows that is right."""
    right, _, actual = _confusion(predicted, labels, classes)
    recall = jnp.where(actual > 0, right / actual, jnp.nan)
    return jnp.nanmean(recall, axis=-1)


def f1(predicted: ArrayLike, labels: ArrayLike, *, classes: int = 2) -> Array:
    """2 right / (predicted + actual): of class 1 for two classes, else the mean.

    The mean is over the classes that occur in labels or predictions (scikit-learn's
    macro average); a problem without any row of class 1 on either side scores NaN.
    """
    right, guessed, actual = _confusion(predicted, labels, classes)
    score = jnp.where(guessed + actual > 0, 2 * right / (guessed + actual), jnp.nan)
    return score[..., 1] if classes == 2 else jnp.nanmean(score, axis=-1)


def auc(scores: ArrayLike, labels: ArrayLike) -> Array:
    """Probability that a row of class 1 scores above one of class 0; ties count half.

    `scores` and `labels` `[..., n]`; the Mann-Whitney statistic by mid-ranks. Scores
    may be infinite; where one that counts is NaN, so is the result.

    Raises:
      ValueError: a label is none of 1, 0 and -1. Traced labels cannot be checked.
    """
    scores, labels = jnp.broadcast_arrays(jnp.asarray(scores), jnp.asarray(labels))
    if not isinstance(labels, jax.core.Tracer):
        values = np.asarray(labels)
        wrong = values[(values != 1) & (values != 0) & (values != -1)]
        if len(wrong):
            raise ValueError(
                "`labels` must be 1 or 0, or -1 for a row that does not count;"
                f" got {wrong[0]}."
            )
    unknown = jnp.any(jnp.isnan(scores) & (labels >= 0), axis=-1)
    n, last = scores.shape[-1], scores.ndim - 1
    # By score, those that do not count behind all others.
    left_out, scores, labels = lax.sort(
        (labels < 0, scores, labels), dimension=last, num_keys=2
    )
    place = jnp.broadcast_to(jnp.arange(n, dtype=jnp.float32), scores.shape)
    new = (scores[..., 1:] != scores[..., :-1]) | (
        left_out[..., 1:] != left_out[..., :-1]
    )
    edge = jnp.ones_like(left_out[..., :1])
    first = lax.cummax(
        jnp.where(jnp.concatenate([edge, new], axis=-1), place, 0), axis=last
    )
    ends = jnp.concatenate([new, edge], axis=-1)
    final = lax.cummin(jnp.where(ends, place, n), axis=last, reverse=True)
    positive = labels == 1
    p, q = jnp.sum(positive, axis=-1), jnp.sum(labels == 0, axis=-1)
    # Ranks are counted from the middle: float32 sums keep their digits.
    middle = (p + q - 1) / 2
    ranks = (first + final) / 2 - middle[..., None]
    above = jnp.sum(jnp.where(positive, ranks, 0), axis=-1)
    area = 0.5 + above / (p.astype(jnp.float32) * q)
    return jnp.where(unknown, jnp.nan, area)


def _confusion(predicted, labels, classes: int):
    """Right, predicted and actual rows of each class, `[..., classes]`."""
    predicted, labels = jnp.asarray(predicted), jnp.asarray(labels)
    each = jnp.arange(classes)[:, None]
    actual = labels[..., None, :] == each
    guessed = (predicted[..., None, :] == each) & (labels >= 0)[..., None, :]
    return tuple(
        jnp.sum(part, axis=-1, dtype=jnp.float32)
        for part in (actual & guessed, guessed, actual)
    )


def evaluate(
    x: ArrayLike, weights: ArrayLike, intercepts: ArrayLike, problems: Problems
) -> Scores:
    """Scores problem p of `problems` with the p-th weights, on the problem's rows.

    The shapes are those of `fit_logistic`, with or without a `layer` axis on `x`,
    `weights` and `intercepts`. To test what was trained elsewhere, pass problems that
    hold the rows to test on (`only_folds`) and the weights in their order. Holds the
    margins of the rows that are tested and no other rows x problems array. Not under
    `jit` or `vmap`: which margins belong to which problem is decided on the host.

    Raises:
      ValueError: shapes do not fit, `x` is not finite, or `problems` breaks a rule.
    """
    x = jnp.asarray(x)
    weights, intercepts = jnp.asarray(weights), jnp.asarray(intercepts)
    if x.ndim not in (2, 3) or (x.ndim == 3 and len(x) == 0):
        raise ValueError(
            "`x` must be [n, d] or [layer, n, d], of one layer or more;"
            f" got shape {x.shape}."
        )
    check_labels(problems, x.shape[-2])
    outputs = 1 if problems.classes == 2 else problems.classes
    layers = x.shape[:-2]
    wanted = (*layers, problems.count, *(() if outputs == 1 else (outputs,)))
    if intercepts.shape != wanted or weights.shape != (*wanted, x.shape[-1]):
        raise ValueError(
            f"`weights` must be {[*wanted, x.shape[-1]]} and `intercepts`"
            f" {list(wanted)}; got {list(weights.shape)} and {list(intercepts.shape)}."
        )
    check_finite(x)
    packed = batching.pack(problems)
    weights = weights.reshape(-1, problems.count, outputs, x.shape[-1])
    intercepts = intercepts.reshape(-1, problems.count, outputs)
    found = []
    for layer in range(len(weights)):
        margins, labels, owners = [], [], []
        for batch, ids in zip(packed.batches, packed.ids):
            own = np.append(ids, ids[:1])[np.minimum(batch.problem, len(ids))]
            block = np.asarray(
                _margins(
                    x,
                    batch.rows + layer * x.shape[-2],
                    own[batch.tile],
                    weights[layer],
                    intercepts[layer],
                )
            )
            real = (batch.labels >= 0) & (batch.problem < len(ids))[batch.tile][
                ..., None
            ]
            real = real & batch.used[:, None, None]
            at = np.nonzero(real)
            margins.append(block.swapaxes(2, 3)[at])
            labels.append(batch.labels[at])
            owners.append(own[batch.tile][at[0], at[1]])
        found.append(
            _scores(
                *_aligned(
                    np.concatenate(margins),
                    np.concatenate(labels),
                    np.concatenate(owners),
                    problems.count,
                ),
                classes=problems.classes,
            )
        )
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *found)
    return stacked if layers else jax.tree.map(lambda a: a[0], stacked)


@jax.jit
def _margins(
    x: Float[Array, "*l n d"],
    rows: Int[Array, "b r"],
    columns: Int[Array, "b c"],
    weights: Float[Array, "p k d"],
    intercepts: Float[Array, "p k"],
) -> Float[Array, "b c k r"]:
    x = x.reshape(-1, x.shape[-1])

    def one(block):
        rows, columns = block
        return decision(x[rows], weights[columns], intercepts[columns])

    return lax.map(one, (rows, columns))


def _aligned(margins, labels, owners, count: int):
    """Margins `[p, k, m]` and labels `[p, m]`, short problems padded with -1."""
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=count)
    place = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    # A power of two: problems of about the same size share a trace.
    m = 1 << int(counts.max(initial=1) - 1).bit_length()
    all_labels = np.full((count, m), -1, np.int32)
    all_margins = np.zeros((count, margins.shape[1], m), margins.dtype)
    at = owners[order], place
    all_labels[at] = labels[order]
    all_margins.swapaxes(1, 2)[at] = margins[order]
    return all_margins, all_labels


@functools.partial(jax.jit, static_argnames=("classes",))
def _scores(margins, labels, *, classes: int) -> Scores:
    def one(problem):
        margins, labels = problem
        if classes == 2:
            predicted, area = margins[0] > 0, auc(margins[0], labels)
        else:
            predicted, area = jnp.argmax(margins, axis=0), jnp.nan
        return Scores(
            jnp.sum(labels >= 0),
            accuracy(predicted, labels),
            balanced_accuracy(predicted, labels, classes=classes),
            f1(predicted, labels, classes=classes),
            jnp.asarray(area, jnp.float32),
        )

    return lax.map(one, (margins, labels))
