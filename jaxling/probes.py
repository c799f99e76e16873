"""Probes: what is linearly decodable from vectors, where, and beyond chance.

A task is rows and a class for each of them. Many tasks, folds and layers are one call
of `kernels.fit_logistic`; every score comes with its spread over the folds.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from jaxling import kernels

PAPER_SEED = 150  # of the under-sampling in Hyperpolyglot LLMs


class Task(NamedTuple):
    """A question put to rows of a matrix: `labels[i]` is the class of `rows[i]`."""

    rows: np.ndarray
    labels: np.ndarray


class CrossValidation(NamedTuple):
    """Scores of tasks on the folds they were not trained on.

    Each field of `scores` is `[..., task, fold]`, `...` being the layers if there are
    any; `fit` holds the probes, problem `task * folds + fold`.
    """

    scores: kernels.Scores
    fit: kernels.LogisticFit


class Interval(NamedTuple):
    """A mean over folds, the standard deviation, and a confidence interval."""

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray


def unit_rows(matrix) -> np.ndarray:
    """The rows at length one, in float32; zero rows stay zero."""
    matrix = np.asarray(matrix, np.float32)
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(norms > 0, norms, 1)


def stratified_folds(labels, folds: int = 10) -> np.ndarray:
    """The fold of each row, `[n]`: those of scikit-learn's unshuffled StratifiedKFold.

    The classes are dealt to the folds in turn, all rows sorted by class, classes by
    first appearance; within a class the rows keep their order. That is what
    `cross_val_score(..., cv=folds)` uses for a classifier.

    Raises:
      ValueError: a class has fewer rows than there are folds; fewer than two folds.
    """
    _check_folds(folds)
    labels = np.asarray(labels)
    values, first, code = np.unique(labels, return_index=True, return_inverse=True)
    code = np.argsort(np.argsort(first))[code]
    fewest = np.bincount(code).min() if len(labels) else 0
    if fewest < folds:
        raise ValueError(f"`folds` is {folds}, but a class has {fewest} rows.")
    dealt = np.sort(code)
    result = np.empty(len(labels), np.int64)
    for c in range(len(values)):
        shares = [np.count_nonzero(dealt[f::folds] == c) for f in range(folds)]
        result[code == c] = np.repeat(np.arange(folds), shares)
    return result


def _check_folds(folds: int) -> None:
    if folds < 2:
        raise ValueError(f"`folds` must be an integer > 1; got {folds}.")


def folds_by_type(types, folds: int = 10, *, seed: int = 0) -> np.ndarray:
    """The fold of each row, with all rows of one type (a word) in one fold.

    A probe cannot then score by having seen the word. Types are dealt in an order
    shuffled by `seed`, the most frequent first, each to the smallest fold.

    Raises:
      ValueError: fewer than two folds.
    """
    _check_folds(folds)
    _, code, counts = np.unique(types, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order], kind="stable")]
    sizes, fold_of = np.zeros(folds), np.zeros(len(counts), np.int64)
    for kind in order:
        fold_of[kind] = np.argmin(sizes)
        sizes[fold_of[kind]] += counts[kind]
    return fold_of[code]


def undersample(labels, *, seed: int = PAPER_SEED) -> np.ndarray:
    """Rows of a class-balanced sample: all of the smallest class, as many of the rest.

    The rows, and their order, are those that imbalanced-learn's
    `RandomUnderSampler(random_state=seed)` draws. Label -1 is left out.
    """
    labels = np.asarray(labels)
    state = np.random.RandomState(seed)
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    smallest = np.argmin(counts) if len(counts) else 0
    chosen = [np.zeros(0, np.int64)]
    for i, value in enumerate(values):
        rows = np.flatnonzero(labels == value)
        if i != smallest:
            rows = rows[state.choice(len(rows), size=counts[smallest], replace=False)]
        chosen.append(rows)
    return np.concatenate(chosen)


def one_vs_rest_tasks(
    categories: Sequence[str], *, least: int = 500, seed: int = PAPER_SEED
) -> dict[str, Task]:
    """A balanced task for each category with at least `least` rows, by name.

    Class 1 is the category; class 0 is drawn from all other rows, of which there are
    as many (or class 1 from the category, where that is the larger side).
    Hyperpolyglot LLMs (https://arxiv.org/abs/2311.18034), section 3.2.
    """
    kinds, code = np.unique(np.asarray(categories, dtype=object), return_inverse=True)
    tasks = {}
    for c in range(len(kinds)):
        labels = (code == c).astype(np.int64)
        if least <= labels.sum() < len(labels):
            rows = undersample(labels, seed=seed)
            tasks[str(kinds[c])] = Task(rows, labels[rows])
    return tasks


def control_labels(types, labels, *, seed: int = 0) -> np.ndarray:
    """A random label for each type, drawn from how often the labels occur.

    Every row of a type gets the type's label: a probe can score on it only by
    remembering types. Hewitt and Liang, 2019, https://arxiv.org/abs/1909.03368.
    """
    labels = np.asarray(labels)
    kinds, code = np.unique(types, return_inverse=True)
    return np.random.default_rng(seed).choice(labels, size=len(kinds))[code]


def selectivity(task: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Accuracy on a task less that on its control task (Hewitt and Liang, 2019)."""
    return np.asarray(task) - np.asarray(control)


def cross_validate(
    x,
    tasks: Sequence[Task] | Mapping[str, Task],
    *,
    folds: int | Sequence[np.ndarray] = 10,
    classes: int = 2,
    l2: float = 1.0,
) -> CrossValidation:
    """Fits every task without each fold, on every layer, and scores it on that fold.

    `x` is `[n, d]` or `[layer, n, d]`. `folds` is how many `stratified_folds`, or for
    each task the fold of each of its rows (-1: always trained on, never tested on).
    Scores are in the order of the tasks, `[..., task, fold]`.
    """
    tasks = list(tasks.values()) if isinstance(tasks, Mapping) else tasks
    if isinstance(folds, int):
        count = folds
        own = [stratified_folds(task.labels, count) for task in tasks]
    else:
        own = [np.asarray(fold) for fold in folds]
        count = 1 + max(int(fold.max(initial=0)) for fold in own)
    problems = kernels.independent(tasks, classes=classes)
    fit = kernels.fit_logistic(x, kernels.leave_folds_out(problems, own, count), l2=l2)
    scores = kernels.evaluate(
        x, fit.weights, fit.intercepts, kernels.only_folds(problems, own, count)
    )
    split = [np.asarray(a).reshape(*a.shape[:-1], len(tasks), count) for a in scores]
    return CrossValidation(kernels.Scores(*split), fit)


def pairwise_accuracy(
    x,
    categories: Sequence[str],
    *,
    names: Sequence[str],
    rows: int,
    folds: int = 10,
    seed: int = PAPER_SEED,
    l2: float = 1.0,
) -> np.ndarray:
    """Held-out accuracy `[..., name, name]` of telling each two categories apart.

    Each category gives `rows` rows, the same ones for all its pairs, so chance is one
    half everywhere; NaN on the diagonal. Low values are the entangled pairs.
    """
    of_row = np.asarray(categories, dtype=object)
    state = np.random.RandomState(seed)
    labels = np.full(len(categories), -1)
    fold = np.full(len(categories), -1)
    for c, name in enumerate(names):
        own = state.choice(np.flatnonzero(of_row == name), rows, replace=False)
        labels[own], fold[own] = c, np.arange(rows) * folds // rows
    pairs = kernels.one_vs_one(labels)
    fit = kernels.fit_logistic(x, kernels.leave_folds_out(pairs, fold, folds), l2=l2)
    scores = kernels.evaluate(
        x, fit.weights, fit.intercepts, kernels.only_folds(pairs, fold, folds)
    )
    mean = np.asarray(scores.accuracy)
    mean = mean.reshape(*mean.shape[:-1], -1, folds).mean(axis=-1)
    matrix = np.full((*mean.shape[:-1], len(names), len(names)), np.nan)
    first, second = np.triu_indices(len(names), 1)
    matrix[..., first, second] = matrix[..., second, first] = mean
    return matrix


def transfer_matrix(
    x,
    groups: Sequence[str] | np.ndarray,
    labels,
    items,
    *,
    folds: int = 5,
    l2: float = 1.0,
    seed: int = 0,
) -> tuple[list[str], np.ndarray]:
    """Trained on one group, tested on each: names, accuracy `[..., source, target]`.

    `groups` (languages), `labels` (class, 0 to classes - 1) and `items` (what is the
    same in all groups: a verse, a question) are `[n]`. No item is on both sides: probes
    are trained on four folds of the items of the source and tested on the fifth of the
    target. Balanced accuracy, so chance is 1 / classes in every group.

    Raises:
      ValueError: a group lacks a class in a fold's training rows.
    """
    names, group = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    labels = np.asarray(labels)
    classes = int(labels.max()) + 1
    fold = folds_by_type(items, folds, seed=seed)
    rows = [np.flatnonzero(group == g) for g in range(len(names))]
    sources = kernels.independent([(r, labels[r]) for r in rows], classes=classes)
    fit = kernels.fit_logistic(x, kernels.leave_folds_out(sources, fold, folds), l2=l2)
    # A target's tile has a column for each source: source * targets + target.
    targets = len(names)
    tiles = tuple(
        tile._replace(
            problems=np.arange(targets) * targets + g,
            labels=np.repeat(tile.labels, targets, axis=0),
        )
        for g, tile in enumerate(sources.tiles)
    )
    tests = kernels.Problems(tiles, targets**2, classes)
    tests = kernels.only_folds(tests, fold, folds)
    source = np.arange(targets**2 * folds) // (targets * folds)
    probe = source * folds + np.arange(targets**2 * folds) % folds
    layered = np.ndim(x) == 3
    weights, intercepts = (
        a[:, probe] if layered else a[probe] for a in (fit.weights, fit.intercepts)
    )
    scores = kernels.evaluate(x, weights, intercepts, tests)
    mean = np.asarray(scores.balanced_accuracy)
    mean = np.nanmean(mean.reshape(*mean.shape[:-1], targets, targets, folds), axis=-1)
    return names.tolist(), mean


class LayerProbes(NamedTuple):
    """Probes `[layer, label]` of one label against the others, and their controls.

    `accuracy` and `control` are intervals over folds, `selectivity` the difference of
    their means; `rows` counts the rows of each label's balanced task. `left_out` says
    of the labels without a probe why they have none.
    """

    names: list[str]
    rows: list[int]
    accuracy: Interval
    control: Interval
    selectivity: np.ndarray
    unsolved: int
    left_out: dict[str, str]


def probe_layers(
    x, labels: Sequence[str], types, *, least: int = 50, folds: int = 5, seed: int = 0
) -> LayerProbes:
    """One-against-rest probes of every label on every layer of `x` `[layer, n, d]`.

    All layers, labels, folds and the control task are one fit. No type is on both
    sides of a fold. Labels are named by their `str`. One with fewer than `least` rows
    is left out, and so is one whose rows, or the others', or those of a class of its
    control, are in one fold alone, as those of a single type are: without that fold
    nothing would be left to learn from.

    Raises:
      ValueError: `x` is not `[layer, n, d]`, `labels` or `types` are not `[n]`, or
        fewer than two labels are left.
    """
    if np.ndim(x) != 3:
        raise ValueError(f"`x` must be [layer, n, d]; got shape {np.shape(x)}.")
    for argument, given in (("labels", labels), ("types", types)):
        if len(given) != np.shape(x)[1]:
            raise ValueError(
                f"`{argument}` must have one entry for each of the {np.shape(x)[1]}"
                f" rows of `x`; got {len(given)}."
            )
    labels = [str(label) for label in labels]
    fold = folds_by_type(types, folds, seed=seed)
    kinds, code = np.unique(np.asarray(labels, dtype=object), return_inverse=True)
    control = kinds[control_labels(types, code, seed=seed)]
    drawn = one_vs_rest_tasks(labels, least=least, seed=seed)
    tasks, controls, left_out = {}, [], {}
    for name, count in sorted(collections.Counter(labels).items()):
        if name not in drawn:
            left_out[name] = f"{count} rows"
            continue
        random = (control == name).astype(np.int64)
        rows = undersample(random, seed=seed)
        other = Task(rows, random[rows])
        for what, own in (("task", drawn[name]), ("control task", other)):
            if not _in_two_folds(own, fold):
                left_out[name] = f"{count} rows, a class of its {what} in one fold"
                break
        else:
            tasks[name] = drawn[name]
            controls.append(other)
    if len(tasks) < 2:
        told = [f"{name} ({why})" for name, why in left_out.items()]
        raise ValueError(
            f"Fewer than two labels have {least} rows that are not all in one fold;"
            f" left out are {', '.join(told[:20])}{', ...' * (len(told) > 20)}."
        )
    both = [*tasks.values(), *controls]
    found = cross_validate(x, both, folds=[fold[task.rows] for task in both])
    accuracy = found.scores.accuracy
    right = over_folds(accuracy[:, : len(tasks)])
    by_chance = over_folds(accuracy[:, len(tasks) :])
    return LayerProbes(
        list(tasks),
        [len(own.rows) for own in tasks.values()],
        right,
        by_chance,
        selectivity(right.mean, by_chance.mean),
        int((~np.asarray(found.fit.converged)).sum()),
        left_out,
    )


def _in_two_folds(task: Task, fold: np.ndarray) -> bool:
    """Whether each class has rows whichever fold is left out."""
    return all(len(set(fold[task.rows[task.labels == c]])) > 1 for c in (0, 1))


class Transfer(NamedTuple):
    """Balanced accuracy `[layer, source, target]` between the groups `names`.

    `within` and `across` `[layer]` are its means on and off the diagonal; `dropped`
    are the groups without rows of every label.
    """

    names: list[str]
    labels: list[str]
    accuracy: np.ndarray
    within: np.ndarray
    across: np.ndarray
    dropped: list[str]


def transfer_by_layer(
    x,
    groups: Sequence[str],
    labels: Sequence[str],
    items,
    *,
    centred: bool = False,
    folds: int = 5,
    seed: int = 0,
) -> Transfer:
    """`transfer_matrix` on every layer of `x` `[layer, n, d]`, labels being names.

    `centred` takes the mean of its group from every row first: what is left is what the
    groups share but for their place (Libovický et al., 2020,
    https://arxiv.org/abs/2004.05160). Groups with fewer rows of a label than there are
    folds are left out.

    Raises:
      ValueError: fewer than two groups or labels are left; `x` is not `[layer, n, d]`.
    """
    x = np.asarray(x)
    if x.ndim != 3:
        raise ValueError(f"`x` must be [layer, n, d]; got shape {x.shape}.")
    names, code = np.unique(np.asarray(labels, dtype=object), return_inverse=True)
    group, items = np.asarray(groups, dtype=object), np.asarray(items, dtype=object)
    counts = {g: np.bincount(code[group == g], minlength=len(names)) for g in groups}
    dropped = sorted(g for g, count in counts.items() if count.min() < folds)
    kept = np.flatnonzero(~np.isin(group, dropped))
    if len(names) < 2 or len(counts) - len(dropped) < 2:
        raise ValueError(
            "Transfer needs two groups with at least"
            f" {folds} rows of each of two labels; of {sorted(counts)}, {dropped} lack"
            f" one of {names.tolist()}."
        )
    x = x[:, kept]
    if centred:
        _, own = np.unique(group[kept], return_inverse=True)
        for g in range(own.max() + 1):
            x[:, own == g] -= x[:, own == g].mean(axis=1, keepdims=True)
    found, accuracy = transfer_matrix(
        x, group[kept], code[kept], items[kept], folds=folds, seed=seed
    )
    diagonal = np.eye(len(found), dtype=bool)
    return Transfer(
        found,
        names.tolist(),
        accuracy,
        accuracy[:, diagonal].mean(axis=1),
        accuracy[:, ~diagonal].mean(axis=1),
        dropped,
    )


def over_folds(values, *, confidence: float = 0.95) -> Interval:
    """Mean and confidence interval over the last axis, `k` folds.

    Folds share training rows, so the variance of their mean is taken as
    s^2 (1 / k + 1 / (k - 1)), the second term for the overlap (Nadeau and Bengio 2003,
    https://doi.org/10.1023/A:1024068626366), with Student's t of k - 1 degrees. `std`
    is the plain standard deviation, divided by k, as the paper's tables have it. The
    values are scores in [0, 1], and so are the ends of the interval.
    """
    values = np.asarray(values, np.float64)
    k = values.shape[-1]
    mean = values.mean(axis=-1)
    if k < 2:
        unknown = np.full_like(mean, np.nan)
        return Interval(mean, np.zeros_like(mean), unknown, unknown)
    t = special.stdtrit(k - 1, 0.5 + confidence / 2)
    half = t * values.std(axis=-1, ddof=1) * np.sqrt(1 / k + 1 / (k - 1))
    low, high = np.maximum(mean - half, 0), np.minimum(mean + half, 1)
    return Interval(mean, values.std(axis=-1), low, high)


def summary(tasks: Mapping[str, Task], accuracy) -> list[dict]:
    """A record per task: rows, mean accuracy over folds, its spread and interval."""
    interval = over_folds(accuracy)
    return [
        {"name": name, "rows": len(task.rows)}
        | {field: float(value[i]) for field, value in interval._asdict().items()}
        for i, (name, task) in enumerate(tasks.items())
    ]
