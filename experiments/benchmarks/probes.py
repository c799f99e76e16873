"""Logistic probes against scikit-learn over two processes, interleaved in one run.

python -m experiments.benchmarks.probes --workload=paper

Workloads:
  paper   16 categories x 10 folds (160 problems), 30,000 x 768 synthetic rows
  real    the same protocol on the embedding of --model, its 16 largest categories
  pairs   435 one-vs-one pairs of 30 classes x 5 draws of 80% of each class, 6,000 x 768
          synthetic rows
  layers  the paper's on 12 layers, first call (compilation included) against one pass

The first call is timed too: it includes tracing and compilation. Objectives are
evaluated in float64 on the rows; "worse" counts the problems where ours is above
scikit-learn's (default tolerance) times 1 + 1e-6. Memory is what calls in a fresh
process add to its resident size at the most, the features being there already.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import joblib
import numpy as np
import optax
from absl import app, flags
from sklearn.linear_model import LogisticRegression

from jaxling import checkpoints, kernels, probes, vocabulary, writing_systems

from .. import common
from . import harness

_WORKLOAD = flags.DEFINE_enum(
    "workload", "paper", ["paper", "real", "pairs", "layers"], "What is timed."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved repetitions.")
_OPTAX = flags.DEFINE_bool(
    "optax", False, "Also vmapped optax L-BFGS (pairs, one seed)."
)


def clusters(
    n: int, d: int, classes: int, *, equal: bool, distance: float = 0.5, seed: int = 0
):
    """Unit rows around class centres, variances falling as 1 / i; and their classes.

    Centres are `distance` from the origin.
    """
    rng = np.random.default_rng(seed)
    share = np.ones(classes) if equal else 1 / np.arange(1, classes + 1) ** 1.3
    sizes = np.maximum((share / share.sum() * n).astype(int), min(500, n // classes))
    sizes[0] += n - sizes.sum()
    labels = np.repeat(np.arange(classes), sizes)
    if not equal:
        rng.shuffle(labels)
    spread = np.arange(1, d + 1) ** -0.5
    axes = np.linalg.qr(rng.standard_normal((d, d)))[0]
    centres = rng.standard_normal((classes, d))
    centres *= distance / np.linalg.norm(centres, axis=1, keepdims=True)
    rows = rng.standard_normal((n, d)) * spread @ axes.T + centres[labels]
    return probes.unit_rows(rows), labels


def paper_problems(names):
    """The protocol of the paper on 16 categories: problems, one by one, and tests."""
    kinds, counts = np.unique(names, return_counts=True)
    largest = set(kinds[np.argsort(-counts)[:16]])
    tasks = probes.one_vs_rest_tasks(list(names), least=10)
    tasks = [task for name, task in tasks.items() if name in largest]
    folds = [probes.stratified_folds(task.labels) for task in tasks]
    whole = kernels.independent(tasks)
    problems = kernels.leave_folds_out(whole, folds, 10)
    tests = kernels.only_folds(whole, folds, 10)
    single = [
        (task.rows[fold != f], task.labels[fold != f])
        for task, fold in zip(tasks, folds)
        for f in range(10)
    ]
    return problems, single, tests


def pair_problems(labels, seeds: int = 5, share: float = 0.8):
    """All pairs of classes, each seed with its own draw of every class's rows."""
    rng = np.random.default_rng(1)
    classes = labels.max() + 1
    size = np.bincount(labels).min()
    keep = np.zeros((seeds, len(labels)), bool)
    for seed in range(seeds):
        for c in range(classes):
            own = np.flatnonzero(labels == c)
            keep[seed, rng.choice(own, int(share * size), replace=False)] = True
    problems = kernels.one_vs_one(labels, keep=keep)
    single = []
    for seed in range(seeds):
        for a, b in zip(*np.triu_indices(classes, 1)):
            rows = np.flatnonzero(keep[seed] & ((labels == a) | (labels == b)))
            single.append((rows, (labels[rows] == b).astype(int)))
    return problems, single


def _one(x, rows, labels):
    model = LogisticRegression().fit(x[rows], labels)
    return model.coef_[0], model.intercept_[0]


def scikit_learn(x, single):
    """Every problem on its own, two processes at a time."""
    tasks = (joblib.delayed(_one)(x, *own) for own in single)
    return joblib.Parallel(n_jobs=2)(tasks)


def objective(x, rows, labels, weights, intercept) -> float:
    """In float64; penalty 1."""
    weights = np.asarray(weights, np.float64)
    margins = x[rows].astype(np.float64) @ weights + float(intercept)
    loss = np.logaddexp(0, np.where(labels == 1, -margins, margins)).sum()
    return loss + 0.5 * np.square(weights).sum()


def vmapped_optax(x, single):
    """optax's L-BFGS with its zoom line search under vmap, to scikit-learn's rule."""
    rows = np.stack([rows for rows, _ in single])
    signs = np.stack([2.0 * labels - 1 for _, labels in single]).astype(np.float32)
    own = jax.numpy.asarray(x)[rows]

    def solve(x, sign):
        def loss(v):
            margins = sign * (x @ v[:-1] + v[-1])
            return jax.numpy.sum(jax.nn.softplus(-margins)) + 0.5 * v[:-1] @ v[:-1]

        solver = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(loss)

        def step(state):
            v, inner, _, count = state
            value, gradient = value_and_grad(v, state=inner)
            updates, inner = solver.update(
                gradient, inner, v, value=value, grad=gradient, value_fn=loss
            )
            return optax.apply_updates(v, updates), inner, gradient, count + 1

        def unfinished(state):
            far = jax.numpy.max(jax.numpy.abs(state[2])) / len(sign) > 1e-4
            return far & (state[3] < 100)

        zero = jax.numpy.zeros(x.shape[1] + 1)
        start = (zero, solver.init(zero), zero + jax.numpy.inf, 0)
        return jax.lax.while_loop(unfinished, step, start)[0]

    solve_all = jax.jit(jax.vmap(solve))
    jax.block_until_ready(solve_all(own, signs))
    start = time.perf_counter()
    jax.block_until_ready(solve_all(own, signs))
    return time.perf_counter() - start


def ours(x, problems):
    """Fit with `x` on the device already, to the last result."""
    return jax.block_until_ready(kernels.fit_logistic(x, problems))


def material(workload: str, model: str, tensor: str | None):
    """Rows, problems, the same one by one, and tests (None of pairs)."""
    if workload == "real":
        checkpoint = checkpoints.open_checkpoint(model)
        words = vocabulary.load_vocabulary(model)
        matrix = checkpoint.read(checkpoint.input_embeddings(tensor))
        x = probes.unit_rows(matrix[: len(words.strings)])
        return x, *paper_problems(
            np.array(writing_systems.unicode_categories(words.strings))
        )
    if workload == "pairs":
        x, labels = clusters(6000, 768, 30, equal=True)
        return x, *pair_problems(labels), None
    # Held out, about as many are right as on the vocabulary of `real`.
    x, labels = clusters(30_000, 768, 16, equal=False, distance=0.25)
    if workload == "paper":
        return x, *paper_problems(labels.astype(str))
    rng = np.random.default_rng(2)
    layers = np.empty((12, *x.shape), np.float32)
    for layer in layers:
        layer[:] = x + 0.01 * rng.standard_normal(x.shape, np.float32)
    return layers, *paper_problems(labels.astype(str))


def ours_alone(*of: Any) -> Callable:
    """Ours for a process of its own."""
    x, problems, _, _ = material(*of)
    resident = jax.block_until_ready(jax.numpy.asarray(x))
    return lambda: ours(resident, problems)


def excesses(x, single, fit, theirs) -> np.ndarray:
    """By what share the objective of ours is above theirs, of every problem."""
    return np.array(
        [
            objective(x, rows, labels, fit.weights[p], fit.intercepts[p])
            / objective(x, rows, labels, *theirs[p])
            - 1
            for p, (rows, labels) in enumerate(single)
        ]
    )


def main(argv: list[str]) -> None:
    del argv
    workload = _WORKLOAD.value
    of = workload, common.MODEL.value, common.TENSOR.value
    x, problems, single, tests = material(*of)
    resident = jax.block_until_ready(jax.numpy.asarray(x))
    case = {"workload": workload, "shape": list(x.shape), "problems": problems.count}
    if workload == "layers":
        # One pass of theirs takes minutes: the first call of ours meets one of theirs.
        start = time.perf_counter()
        fit = ours(resident, problems)
        middle = time.perf_counter()
        for layer in x:
            scikit_learn(layer, single)
        seconds = middle - start, time.perf_counter() - middle
        timings = {
            name: harness.Timing(None, [took])
            for name, took in zip(("ours, first call", "sklearn"), seconds)
        }
        found: dict[str, Any] = {
            "sklearn / ours, first call": round(seconds[1] / seconds[0], 2)
        }
    else:
        timings, results = harness.interleaved(
            {
                "ours": lambda: ours(resident, problems),
                "sklearn": lambda: scikit_learn(x, single),
            },
            _ROUNDS.value,
        )
        fit = results["ours"]
        ratio = timings["sklearn"].median / timings["ours"].median
        excess = excesses(x, single, fit, results["sklearn"])
        found = {
            "sklearn / ours": round(ratio, 2),
            "worse": int((excess > 1e-6).sum()),
            "largest excess": float(f"{excess.max():.2e}"),
        }
    found["converged"] = int(np.sum(fit.converged))
    found["iterations"] = [int(fit.iterations.min()), int(fit.iterations.max())]
    rises = harness.peak_rises(ours_alone, *of)
    for which, rise in zip(("first", "later"), rises):
        found[f"peak of a {which} call / features"] = round(rise * 2**20 / x.nbytes, 2)
    if tests is not None and workload != "layers":
        scores = kernels.evaluate(resident, fit.weights, fit.intercepts, tests)
        mean = np.asarray(scores.accuracy, np.float64).reshape(-1, 10).mean(axis=1)
        found["held-out accuracy"] = sorted(mean.round(3).tolist())
    if _OPTAX.value and workload == "pairs":
        _, labels = clusters(6000, 768, 30, equal=True)
        one_seed, single = pair_problems(labels, seeds=1)
        ours(resident, one_seed)
        start = time.perf_counter()
        ours(resident, one_seed)
        found["ours, one seed"] = round(time.perf_counter() - start, 3)
        found["optax, one seed"] = round(vmapped_optax(x, single), 3)
    harness.record("probes", case, timings, found)


if __name__ == "__main__":
    app.run(main)
