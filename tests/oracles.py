"""Slow definitions in float64 NumPy, one small function each."""

import numpy as np


def closeness(queries, keys, metric):
    """`[n, m]`, larger is closer; NaN where a row or key is invalid."""
    q, x = (np.asarray(a, np.float64) for a in (queries, keys))
    valid = [np.isfinite(a).all(axis=1) for a in (q, x)]
    q, x = (np.where(v[:, None], a, 0) for v, a in zip(valid, (q, x)))
    if metric == "cosine":
        norms = [np.linalg.norm(a, axis=1) for a in (q, x)]
        valid = [v & (length > 0) for v, length in zip(valid, norms)]
        q, x = (
            a / np.where(length > 0, length, 1)[:, None]
            for a, length in zip((q, x), norms)
        )
    if metric == "l2":
        scores = -np.square(q[:, None] - x[None]).sum(axis=-1)
    else:
        scores = q @ x.T
    return np.where(valid[0][:, None] & valid[1][None, :], scores, np.nan)


def neighbors(queries, keys, k, metric, excluded=None):
    """Scores and indices `[n, k]`, best first, ties to the lower index."""
    close = closeness(queries, keys, metric)
    if excluded is not None:
        close[np.arange(len(close)), excluded] = np.nan
    cost = np.where(np.isnan(close), np.inf, -close)
    n, m = close.shape
    indices = np.full((n, k), -1)
    scores = np.full((n, k), np.nan)
    if m:
        order = np.argsort(cost, axis=1, kind="stable")[:, :k]
        found = np.take_along_axis(close, order, axis=1)
        width = order.shape[1]
        indices[:, :width] = np.where(np.isnan(found), -1, order)
        scores[:, :width] = -found if metric == "l2" else found
    return scores, indices


def csls(queries, keys, neighborhood):
    """`[n, m]`: 2 cos - r - r, the means over at most `neighborhood` neighbours; NaN
    where a row or key is invalid."""
    cos = closeness(queries, keys, "cosine")
    valid = ~np.isnan(cos)

    def crowding(axis):
        near = np.sort(np.where(valid, -cos, np.inf), axis=axis)
        near = np.take(near, np.arange(min(neighborhood, near.shape[axis])), axis)
        there = np.isfinite(near)
        total = -np.where(there, near, 0).sum(axis=axis, keepdims=True)
        return total / np.maximum(there.sum(axis=axis, keepdims=True), 1)

    return 2 * cos - crowding(1) - crowding(0)


def logistic_objective(x, labels, weights, intercepts, l2, sample_weight=1.0):
    """Penalised loss of one problem: binary (`weights` `[d]`) or multinomial."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    margins = x @ weights.T + np.asarray(intercepts, np.float64)
    if weights.ndim == 1:
        loss = np.logaddexp(0, np.where(np.asarray(labels) == 1, -margins, margins))
    else:
        top = margins.max(axis=1, keepdims=True)
        loss = np.log(np.exp(margins - top).sum(axis=1)) + top[:, 0]
        loss -= margins[np.arange(len(labels)), labels]
    return (sample_weight * loss).sum() + 0.5 * l2 * np.square(weights).sum()


def cross_entropy(hidden, matrix, targets, weights, bias=None, softcap=None):
    """Weighted sum of -log softmax(logits)[target]."""
    h, u, w = (np.asarray(a, np.float64) for a in (hidden, matrix, weights))
    logits = h @ u.T
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    log_sum = np.logaddexp.reduce(logits, axis=1)
    return np.sum(w * (log_sum - logits[np.arange(len(h)), targets]))


def rcsls(w, x, y, source, target, k):
    """Loss and subgradient of relaxed CSLS, one translation pair after the other."""
    w, x, y, source, target = (
        np.asarray(a, np.float64) for a in (w, x, y, source, target)
    )
    loss, gradient = 0.0, np.zeros_like(w)
    for a, b in zip(x, y):
        near = target[np.argsort(-(target @ (a @ w)), kind="stable")[:k]]
        back = source[np.argsort(-(source @ w @ b), kind="stable")[:k]]
        loss -= 2 * a @ w @ b - (near @ (a @ w)).mean() - (back @ w @ b).mean()
        gradient -= 2 * np.outer(a, b)
        gradient += np.outer(a, near.mean(axis=0)) + np.outer(back.mean(axis=0), b)
    return loss / len(x), gradient / len(x)


def rcsls_descent(start, x, y, source, target, k, steps, rate, spectral):
    """The maps and losses of every step: down the subgradient, into the spectral ball
    (singular values cut to [0, 1]) if asked for, and from the best map with half the
    rate after a loss that rose. Joulin et al., 2018, section 3."""
    w, best, losses, maps = np.asarray(start, np.float64), None, [], []
    for step in range(steps + 1):
        loss, gradient = rcsls(w, x, y, source, target, k)
        losses.append(loss)
        maps.append(w)
        if best is None or loss <= best[0]:
            best = loss, w, gradient
        else:
            rate /= 2
        if step == steps:
            break
        w = best[1] - rate * best[2]
        if spectral:
            u, s, vt = np.linalg.svd(w)
            sigma = np.zeros(w.shape)
            np.fill_diagonal(sigma, np.clip(s, 0, 1))
            w = u @ sigma @ vt
    return np.array(losses), maps


def rcsls_script(start, x, y, source, target, k, niter, rate, spectral):
    """As fastText's script has it: the rate alone follows the losses, and the map is
    that after the last of niter + 1 steps, or before the rate fell below 1e-4."""
    w, losses = np.array(start, np.float64), []
    before = None
    for _ in range(niter + 1):
        if rate < 1e-4:
            break
        loss, gradient = rcsls(w, x, y, source, target, k)
        losses.append(loss)
        w = w - rate * gradient
        if spectral and (before is None or loss <= before):
            u, s, vt = np.linalg.svd(w, full_matrices=False)
            w = u @ np.diag(np.minimum(s, 1)) @ vt
        if before is not None and loss > before:
            rate, loss = rate / 2, before
        before = loss
    return np.array(losses), w
