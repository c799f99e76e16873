"""Logistic problems against scikit-learn, and the certificate against the truth."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from sklearn.linear_model import LogisticRegression

from jaxling import kernels
from jaxling.kernels import batching, covariance, lockstep, passes


def columns(problems):
    """Rows, labels and weights of each problem, gathered from its columns."""
    parts = [[] for _ in range(problems.count)]
    for tile in problems.tiles:
        for c, p in enumerate(tile.problems):
            used = tile.labels[c] >= 0
            weights = np.ones(len(tile.rows)) if tile.weights is None else tile.weights
            weights = weights if weights.ndim == 1 else weights[c]
            parts[p].append((tile.rows[used], tile.labels[c][used], weights[used]))
    return [tuple(np.concatenate(side) for side in zip(*part)) for part in parts]


@functools.cache
def reference(x, y, w, shape, l2):
    x = np.frombuffer(x).reshape(shape)
    y, w = np.frombuffer(y, np.int64), np.frombuffer(w)
    model = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=5000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float64 cannot always reach 1e-10
        model.fit(x, y, sample_weight=w)
    return model


def compare(x, problems, l2, fit):
    """Per problem: our objective / scikit-learn's - 1, and the largest weight gap."""
    l2 = np.broadcast_to(l2, problems.count)
    excess, apart, best = [], [], []
    for p, (rows, labels, weights) in enumerate(columns(problems)):
        own = np.asarray(x, np.float64)[rows]
        labels = labels.astype(np.int64)
        model = reference(
            own.tobytes(), labels.tobytes(), weights.tobytes(), own.shape, l2[p]
        )
        binary = problems.classes == 2
        theirs = (
            (model.coef_[0], model.intercept_[0])
            if binary
            else (
                model.coef_,
                model.intercept_,
            )
        )
        objective = functools.partial(
            oracles.logistic_objective, own, labels, l2=l2[p], sample_weight=weights
        )
        target = objective(*theirs)
        excess.append(objective(fit.weights[p], fit.intercepts[p]) / target - 1)
        apart.append(np.abs(np.asarray(fit.weights[p]) - theirs[0]).max())
        best.append(target)
    return np.array(excess), np.array(apart), np.array(best)


def clusters(rng, n, d, classes, spread=1.0):
    labels = np.sort(rng.integers(classes, size=n))
    labels[:classes] = np.arange(classes)
    x = rng.normal(size=(classes, d))[labels] + spread * rng.normal(size=(n, d))
    return x.astype(np.float32), labels


def every_kind(rng):
    """Rows, problems of every kind over them, and their penalties."""
    x, labels = clusters(rng, 173, 9, 4)
    rest = kernels.one_vs_rest(labels)
    keep = rng.random((2, 173)) < 0.7
    problems = kernels.concatenated(
        [
            rest,
            kernels.leave_folds_out(rest, np.arange(173) % 3),
            kernels.one_vs_one(labels, keep=keep),
            kernels.weighted(rest, rng.random(173) * 3),
            kernels.repeated(rest, 5),
        ]
    )
    l2 = np.ones(problems.count)
    l2[-20:] = np.repeat([1e-3, 0.1, 10, 1e3, 1e5], 4)
    return x, problems, l2


def test_every_kind_of_problem_reaches_scikit_learn_in_any_order(rng):
    x, problems, l2 = every_kind(rng)
    fit = kernels.fit_logistic(x, problems, l2=l2)
    excess, apart, best = compare(x, problems, l2, fit)
    assert np.asarray(fit.converged).all()
    assert excess.max() <= 1e-6
    # By strong convexity; scikit-learn's weights are a few 1e-6 from the optimum too.
    assert (apart <= np.sqrt(2 * np.asarray(fit.gap) / l2) + 1e-5).all()
    # A millionth of these objectives is up to 0.02 in the weights: not enough to say
    # more. Float32 does not certify 1e-8 of all of them, but comes near it.
    tight = kernels.fit_logistic(x, problems, l2=l2, tolerance=1e-8)
    assert compare(x, problems, l2, tight)[1][l2 >= 1].max() <= 1e-3
    # Objectives are float32 sums of some hundred losses.
    np.testing.assert_allclose(fit.objective, best, rtol=1e-5)
    assert (np.asarray(fit.gap) >= excess * best - 1e-6 * best).all()
    assert (np.asarray(fit.gap) <= 1e-6 * np.asarray(fit.objective)).all()

    order = rng.permutation(problems.count)
    place = np.argsort(order)
    shuffled = problems._replace(
        tiles=tuple(t._replace(problems=place[t.problems]) for t in problems.tiles)
    )
    moved = kernels.fit_logistic(x, shuffled, l2=l2[order])
    # Two solutions within the tolerance of one optimum.
    np.testing.assert_allclose(moved.objective, fit.objective[order], rtol=2e-6)
    sure = l2[order] >= 1
    np.testing.assert_allclose(moved.weights[sure], fit.weights[order][sure], atol=2e-3)


def hard_features(rng):
    """Constant, duplicated, collinear and badly scaled columns; a large offset."""
    x = rng.normal(size=(60, 8))
    x[:, 1] = 3.0
    x[:, 2] = x[:, 0]
    x[:, 3] = x[:, 0] - 2 * x[:, 4]
    x[:, 5] *= 1e-3
    x[:, 6] *= 30
    x[:, 7] += 100
    return np.concatenate([x, x[:7], x[:7]]).astype(np.float32)


def test_hard_geometry_is_solved_or_owned_up_to(rng):
    x = hard_features(rng)
    n = len(x)
    separable = (x[:, 0] > 0).astype(int)
    lonely = (np.arange(n) == 5).astype(int)
    random = rng.integers(2, size=n)
    tasks = [(np.arange(n), own) for own in (separable, lonely, random)]
    tasks.append((np.arange(2), np.array([0, 1])))
    problems = kernels.repeated(kernels.independent(tasks), 4)
    l2 = np.repeat([1e-6, 1e-2, 1.0, 1e6], 4)
    fit = kernels.fit_logistic(x, problems, l2=l2)
    excess, _, best = compare(x, problems, l2, fit)
    gap = np.asarray(fit.gap)
    assert (excess[np.asarray(fit.converged)] <= 1e-6).all()
    assert np.asarray(fit.converged)[l2 >= 1e-2].all()
    assert (gap >= excess * best - 3e-6 * best).all()
    assert np.isfinite(np.asarray(fit.weights)).all()


def test_features_without_variance_leave_the_intercept(rng):
    labels = np.repeat([0, 1], [15, 5])
    problems = kernels.one_vs_rest(labels)
    for x in (np.zeros((20, 3)), np.ones((20, 3)), 1e-20 * rng.normal(size=(20, 3))):
        fit = kernels.fit_logistic(x.astype(np.float32), problems, l2=1.0)
        assert fit.converged.all()
        np.testing.assert_allclose(fit.intercepts, np.log([3, 1 / 3]), rtol=1e-3)


def test_a_row_that_nobody_reads_has_no_part(rng):
    x, labels = clusters(rng, 2000, 6, 4)
    labels[0] = -1
    problems = kernels.leave_folds_out(kernels.one_vs_rest(labels), np.arange(2000) % 9)
    fit = kernels.fit_logistic(x, problems)
    x[0] *= 1e15
    far = kernels.fit_logistic(x, problems)
    np.testing.assert_array_equal(far.gap, fit.gap)
    np.testing.assert_array_equal(far.weights, fit.weights)


def test_one_product_of_all_blocks_is_a_loop_over_them(rng, monkeypatch):
    monkeypatch.setattr(batching, "BLOCK_ROWS", 64)
    x, labels = clusters(rng, 300, 70, 3)
    x[:, 3:] *= 0.1
    rest = kernels.leave_folds_out(kernels.one_vs_rest(labels), np.arange(300) % 2)
    tasks = [(np.arange(a, 300), labels[a:] == 1) for a in (0, 40, 90)]
    problems = kernels.concatenated([rest, kernels.independent(
        [(rows, own.astype(int)) for rows, own in tasks])])  # fmt: skip
    batch = batching.pack(problems).batches[0]
    assert batch.problem.shape[0] > 1 and len(batch.rows) > len(batch.problem)
    assert passes.WHOLE * batch.labels.shape[1] <= 70
    whole = kernels.fit_logistic(x, problems)
    monkeypatch.setattr(passes, "WHOLE", 1000)
    jax.clear_caches()
    loop = kernels.fit_logistic(x, problems)
    jax.clear_caches()
    np.testing.assert_allclose(whole.objective, loop.objective, rtol=1e-6)
    np.testing.assert_allclose(whole.weights, loop.weights, atol=2e-3)


def test_more_classes_at_once_reach_scikit_learn(rng):
    x, labels = clusters(rng, 150, 6, 5)
    whole = kernels.multinomial(labels)
    problems = kernels.concatenated(
        [kernels.leave_folds_out(whole, np.arange(150) % 3), kernels.repeated(whole, 2)]
    )
    l2 = np.array([1.0, 1.0, 1.0, 0.05, 20.0])
    fit = kernels.fit_logistic(x, problems, l2=l2)
    assert fit.weights.shape == (5, 5, 6) and fit.intercepts.shape == (5, 5)
    excess, apart, best = compare(x, problems, l2, fit)
    assert np.asarray(fit.converged).all()
    assert excess.max() <= 1e-6
    assert apart[l2 >= 1].max() <= 1e-3
    assert (np.asarray(fit.gap) >= (excess - 1e-6) * best).all()


def test_fewer_rows_than_features_and_layers(rng):
    x, labels = clusters(rng, 40, 70, 2)
    rows = np.flatnonzero(np.arange(40) % 4)
    problems = kernels.independent([(rows, labels[rows])])
    layers = np.stack([x, x[:, ::-1] * 0.5])
    fit = kernels.fit_logistic(layers, problems, l2=0.3)
    assert fit.weights.shape == (2, 1, 70)
    for layer in range(2):
        part = jax.tree.map(lambda a, layer=layer: a[layer], fit)
        excess, apart, _ = compare(layers[layer], problems, 0.3, part)
        assert excess.max() <= 1e-6 and apart.max() <= 1e-3
    single = kernels.fit_logistic(x, problems, l2=0.3)
    np.testing.assert_array_equal(single.weights, fit.weights[0])


def test_tiles_of_many_blocks_and_fits_that_are_cut_short(rng, monkeypatch):
    monkeypatch.setattr(batching, "BLOCK_ROWS", 64)
    x, labels = clusters(rng, 1500, 9, 3, spread=2.0)
    problems = kernels.leave_folds_out(kernels.one_vs_rest(labels), np.arange(1500) % 5)
    (batch,) = batching.pack(problems).batches
    assert batch.used.sum() > 8 * len(batch.problem)
    fit = kernels.fit_logistic(x, problems)
    excess, apart, _ = compare(x, problems, 1.0, fit)
    assert excess.max() <= 1e-6 and apart.max() <= 1e-3
    warm = kernels.fit_logistic(x, problems, start=(fit.weights, fit.intercepts))
    assert np.asarray(warm.iterations).max() <= 2
    few = kernels.fit_logistic(x, problems, max_iterations=2)
    assert not np.asarray(few.converged).any() and (few.iterations == 2).all()
    sizes = np.array([len(rows) for rows, _, _ in columns(problems)])
    assert (few.objective < sizes * np.log(2)).all()
    assert (np.asarray(few.gap) > np.asarray(fit.gap)).all()


def test_where_zero_is_better_than_the_start_problems_begin_there(rng):
    x, labels = clusters(rng, 300, 7, 3)
    problems = kernels.weighted(kernels.one_vs_rest(labels), rng.uniform(0, 2, 300))
    fit = kernels.fit_logistic(x, problems)
    for scale in (1e2, 1e6, 1e19):
        start = np.array(fit.weights), np.array(fit.intercepts)
        start[0][1] += scale * rng.standard_normal(7)
        start[0][2] = 0.9 * start[0][2]
        for most in (1, 2, 500):
            zero = kernels.fit_logistic(x, problems, max_iterations=most)
            found = kernels.fit_logistic(x, problems, start=start, max_iterations=most)
            # The first is solved, the second begins at zero, the third is nearer.
            assert found.iterations[0] == 1 and found.iterations[1] <= most
            assert abs(found.iterations[1] - zero.iterations[1]) <= 1
            np.testing.assert_allclose(found.weights[1], zero.weights[1], atol=1e-5)
            assert found.objective[2] < zero.objective[2] or most == 500
            for p, (rows, own, weights) in enumerate(columns(problems)):
                at = found.weights[p], found.intercepts[p]
                true = oracles.logistic_objective(x[rows], own, *at, 1.0, weights)
                # Float32 sums of 300 losses at margins below ten.
                np.testing.assert_allclose(found.objective[p], true, rtol=1e-6)
        assert found.converged.all()


def test_a_start_that_is_good_enough_is_kept_as_it_is(rng):
    """With its objective; also where zero is a little better and good enough too."""
    x, labels = rng.standard_normal((400, 5)).astype(np.float32), np.arange(400) % 2
    problems = kernels.one_vs_rest(labels)
    for tolerance, l2 in ((0.5, 100), (0.1, 1e3), (1e-2, 1e4), (1e-4, 1e6)):
        for size in np.geomspace(1e-3, 1, 7):
            start = np.full((2, 5), size), np.zeros(2)
            fit = kernels.fit_logistic(
                x, problems, l2=l2, start=start, tolerance=tolerance
            )
            for p in range(2):
                at = fit.weights[p], fit.intercepts[p]
                true = oracles.logistic_objective(x, labels == p, *at, l2)
                np.testing.assert_allclose(fit.objective[p], true, rtol=1e-6)


def test_many_classes_layers_rows_and_float64_begin_where_they_are_told(rng):
    x, labels = clusters(rng, 60, 9, 3)
    wide = rng.standard_normal((2, 40, 90)).astype(np.float32)
    for features, problems in (
        (x, kernels.multinomial(labels)),
        (wide, kernels.one_vs_rest(np.arange(40) % 3)),
        (np.stack([x, -x]), kernels.one_vs_one(labels)),
    ):
        fit = kernels.fit_logistic(features, problems)
        near = np.array(fit.weights), np.array(fit.intercepts)
        assert (
            kernels.fit_logistic(features, problems, start=near).iterations < 3
        ).all()
        noise = 1e7 * rng.standard_normal(near[0].shape)
        far = kernels.fit_logistic(features, problems, start=(noise, near[1]))
        assert (far.iterations == fit.iterations).all() and far.converged.all()
        np.testing.assert_allclose(far.objective, fit.objective, rtol=1e-6)


def test_sums_of_many_or_uneven_losses_solve_as_others_do(rng):
    """Whose objective at zero float32 sums up in two ways to two numbers."""
    n = 20_011
    x = rng.standard_normal((n, 3)).astype(np.float32)
    y = (x[:, 0] + rng.standard_normal(n) > 0).astype(int)
    fit = kernels.fit_logistic(x, kernels.independent([(np.arange(n), y)]))
    assert fit.converged.all() and fit.iterations[0] < 10
    for seed in range(6):
        draws = np.random.default_rng(seed)
        x = draws.standard_normal((300, 4)).astype(np.float32)
        weights = np.ones(300)
        weights[0] = 10.0 ** draws.uniform(3, 7)
        tasks = [(np.arange(300), draws.integers(2, size=300)) for _ in range(8)]
        problems = kernels.weighted(kernels.independent(tasks), weights)
        assert kernels.fit_logistic(x, problems).converged.all()


@pytest.mark.parametrize("scale", [1e-9, 1, 1e9])
@pytest.mark.parametrize("rank", [20, 60, 70, 200])
def test_the_preconditioner_is_near_the_inverse(rng, rank, scale):
    """Also where columns of the span depend on each other: nothing counts twice."""
    d, m = 200, 400
    lengths = np.where(np.arange(d) < rank, np.arange(1, d + 1) ** -0.5, 0)
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    x = np.float32(scale * rng.standard_normal((2 * m, d)) * lengths @ axes)
    pairs = np.arange(2 * m).reshape(2, m)
    basis = covariance.basis_of_rows(x, pairs, np.dtype("float32"))
    directions, variances, tail = (np.float64(part) for part in basis)
    assert directions.shape == (
        d,
        covariance.SPANS * covariance.SPAN - covariance.SPARE,
    )
    assert np.linalg.norm(directions, 2) < 1 + 1e-4
    difference = np.float64(x[pairs[0]] - x[pairs[1]])
    spread = difference.T @ difference / (2 * m)
    for curvature in (1 / scale**2, 1e3 / scale**2):
        flat = 1 / (1 + curvature * tail)
        top = 1 / (1 + curvature * variances) - flat
        inverse = flat * np.eye(d) + (directions * top) @ directions.T
        root = np.linalg.cholesky(np.eye(d) + curvature * spread)
        product = np.linalg.eigvalsh(root.T @ inverse @ root)
        # One but for the rest of the 200 variances, which fall by a third there.
        assert 0.3 < product[0] and product[-1] < 2.5


def test_steep_spectra_take_few_iterations(rng):
    """A span whose columns are not at one scale resolves the first directions alone."""
    for d in (61, 100, 200):
        x = np.float32(rng.standard_normal((1500, d)) * np.arange(1, d + 1.0) ** -2)
        labels = x @ rng.standard_normal(d) * 3 + rng.standard_normal(1500) > 0
        problems = kernels.one_vs_rest(labels.astype(int))
        fit = kernels.fit_logistic(x, problems, l2=1e-3)
        assert fit.converged.all() and (fit.iterations < 40).all()


def test_classes_share_nothing_and_converge(rng):
    """What all classes share only the penalty bends: it must not be stirred up."""
    x = np.float32(rng.normal(size=(600, 60)))
    y = x @ rng.normal(size=60) + 3 * rng.normal(size=600)
    problems = kernels.multinomial(np.digitize(y, [-5, 0, 5]))
    fit = kernels.fit_logistic(x, problems, l2=0.01)
    assert fit.converged.all() and (fit.iterations < 120).all()
    shared = fit.weights + 3.0, fit.intercepts + 5.0
    for found in (fit, kernels.fit_logistic(x, problems, l2=0.01, start=shared)):
        np.testing.assert_allclose(found.weights.sum(axis=1), 0, atol=1e-5)
        np.testing.assert_allclose(found.intercepts.sum(axis=1), 0, atol=1e-5)
    assert (found.iterations <= 2).all()


def test_the_gradient_is_that_of_the_rows_as_they_are(rng):
    x, labels = clusters(rng, 200, 6, 2)
    x = np.float32(x + 30)
    fit = kernels.fit_logistic(x, kernels.one_vs_rest(labels), max_iterations=3)
    for c, own in enumerate(np.float64(fit.weights)):
        margins = np.float64(x) @ own + np.float64(fit.intercepts[c])
        residual = 1 / (1 + np.exp(-margins)) - (labels == c)
        gradient = np.append(residual @ np.float64(x) + own, residual.sum())
        norm = np.linalg.norm(gradient)
        np.testing.assert_allclose(fit.gradient_norm[c], norm, rtol=1e-3)


@pytest.mark.parametrize("d", [60, 61, 119, 120, 300])
def test_eigenproblems_wake_no_threads(d):
    """LAPACK keeps one busy for a tenth of a second after one of 64 columns."""
    arguments = jnp.zeros((999, d)), jnp.zeros((2, 500), int), np.dtype("float32")
    program = covariance.basis_of_rows.lower(*arguments).as_text()
    calls = [line for line in program.splitlines() if "syevd" in line]
    sides = [int(n) for line in calls for n in re.findall(r"(\d+)x\d+xf32", line)]
    assert sides and max(sides) < 64


def test_float64_where_it_is_enabled(rng):
    try:
        from jax.experimental import enable_x64 as enable
    except ImportError:
        enable = jax.enable_x64
    x, labels = clusters(rng, 80, 5, 2)
    problems = kernels.one_vs_one(labels)
    with enable(True):
        fit = kernels.fit_logistic(np.float64(x), problems, tolerance=1e-13)
        assert fit.weights.dtype == np.float64
        assert bool(fit.converged.all())
        excess, apart, _ = compare(x, problems, 1.0, fit)
    assert abs(excess).max() <= 1e-12 and apart.max() <= 1e-6


def test_a_job_is_one_trace_and_batches_hold_every_problem(rng):
    x, labels = clusters(rng, 700, 7, 6)
    tasks = []
    for c in range(6):
        own = np.flatnonzero(labels == c)
        rest = rng.permutation(np.flatnonzero(labels != c))[: len(own) // (c + 1)]
        rows = np.concatenate([own, rest])
        tasks.append((rows, (labels[rows] == c).astype(int)))
    folds = [np.arange(len(rows)) % 4 for rows, _ in tasks]
    problems = kernels.leave_folds_out(kernels.independent(tasks), folds)
    packed = batching.pack(problems)
    assert sorted(np.concatenate(packed.ids)) == list(range(24))
    before = lockstep.solve._cache_size(), passes.gather._cache_size()
    kernels.fit_logistic(x, problems)
    kernels.fit_logistic(np.stack([x, x]), problems)
    assert lockstep.solve._cache_size() - before[0] == 1
    # Shapes of `x` differ, and there is memory of an earlier batch or not.
    assert passes.gather._cache_size() - before[1] <= 4


def test_no_rows_by_problems_array(rng):
    n, d, classes = 4000, 16, 160
    problems = kernels.one_vs_rest(np.arange(n) % classes)
    packed = batching.pack(problems)
    batch = packed.batches[0]
    assert batch.labels.shape[1] <= batching.COLUMNS
    p, dtype = len(batch.owner), np.dtype("float32")
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    rows = passes.Rows(
        spec((*batch.rows.shape, d)), spec((len(batch.centre), d)), spec(())
    )
    pairs = batching.pairs_of_rows(problems.tiles)
    basis = jax.eval_shape(
        lambda x: covariance.basis_of_rows(x, pairs, dtype), spec((n, d))
    )
    begin = lockstep.Point(spec((p, 1, d)), spec((p, 1)))
    rule = np.ones(p, bool), np.float32(1e-6), np.array([500], np.int32)
    lowered = lockstep.solve.lower(rows, batch, basis, spec((p,)), begin, *rule)
    memory = lowered.compile().memory_analysis()
    # Margins and steps, what they become and the zeros they start from: arrays of
    # rows x the columns of one batch, a third of the problems here. And its labels,
    # of one byte.
    assert memory.temp_size_in_bytes < 7.25 * n * batch.labels.shape[1] * 4


def test_batches_hold_the_largest_group_or_few_rows(rng):
    many = [(np.arange(5000), np.arange(5000) % 2)] * 16
    some = [(rng.permutation(5000)[:500], np.arange(500) % 2) for _ in range(100)]
    for problems in (
        kernels.independent(many),
        kernels.independent(some),
        kernels.concatenated(
            [kernels.independent(many[:1]), kernels.independent(some)]
        ),
        kernels.one_vs_rest(np.arange(5000) % 256),
    ):
        rows = batching.pack(problems).batches[0].rows
        assert rows.size <= 1.2 * 5000
    pairs = batching.pack(kernels.one_vs_one(np.arange(2000) % 100))
    assert pairs.batches[0].labels.shape[1] <= batching.COLUMNS


def test_builders(rng):
    labels = np.array([2, 0, 1, 1, 0, -1, 2])
    pairs = kernels.one_vs_one(labels)
    found = {p: (set(rows), dict(zip(rows, own)))
             for p, (rows, own, _) in enumerate(columns(pairs))}  # fmt: skip
    assert found[0][0] == {1, 4, 2, 3} and found[0][1][2] == 1 and found[0][1][1] == 0
    assert found[2][0] == {2, 3, 0, 6} and found[2][1][6] == 1
    rest = kernels.one_vs_rest(labels)
    assert rest.count == 3 and 5 not in rest.tiles[0].rows
    folded = kernels.leave_folds_out(rest, np.array([0, 1, 0, 1, 0, 1, 1]))
    rows, own, _ = columns(folded)[2 * 2 + 1]
    assert set(rows) == {0, 2, 4} and dict(zip(rows, own))[0] == 1
    heavy = kernels.weighted(kernels.repeated(rest, 2), np.arange(7.0))
    rows, _, weights = columns(heavy)[4]
    np.testing.assert_array_equal(rows, weights)
    nothing = kernels.Tile(np.zeros(0, int), np.arange(3), np.zeros((3, 0), int))
    packed = batching.pack(rest._replace(tiles=(nothing, *rest.tiles)))
    assert sorted(np.concatenate(packed.ids)) == [0, 1, 2]


def test_traced_features(rng):
    x, labels = clusters(rng, 173, 9, 4)
    problems = kernels.one_vs_one(labels)
    traced = jax.jit(lambda x: kernels.fit_logistic(x, problems).objective)(x)
    fit = kernels.fit_logistic(x, problems)
    np.testing.assert_allclose(traced, fit.objective, rtol=2e-6)


def test_what_is_wrong_is_named(rng):
    x, labels = clusters(rng, 20, 3, 2)
    problems = kernels.one_vs_one(labels)
    tile = problems.tiles[0]

    def refused(match, x=x, problems=problems, **knobs):
        with pytest.raises(ValueError, match=match):
            kernels.fit_logistic(x, problems, **knobs)

    bad = x.copy()
    bad[7, 1] = np.nan
    refused("row 7 ", x=bad)
    refused(r"\[n, d\]", x=x[0])
    refused("floating", x=np.arange(6).reshape(3, 2))
    refused("`l2`", l2=0.0)
    refused("`l2`.*one a problem", l2=np.array([1.0, 2.0]))
    refused("`max_iterations`", max_iterations=0)
    refused("not be empty", x=x[:, :0])
    refused("not be empty", x=x[None][:0])
    refused("`start` must be finite", start=(np.full((1, 3), np.nan), np.zeros(1)))
    refused("`start`", start=(np.zeros((3, 1)), np.zeros(1)))
    refused("`tolerance`", tolerance=0.0)
    refused("`problems.count`", problems=kernels.Problems((), 0))
    refused("`start`", start=(np.zeros(4), np.zeros(1)))
    refused("row of each class", problems=problems._replace(tiles=(tile,)))
    for name, value, match in (
        ("rows", tile.rows + 19, "`rows` of tile 0"),
        ("labels", tile.labels + 2, "`labels` of tile 0"),
        ("labels", tile.labels[:, 1:], "columns, rows"),
        ("problems", tile.problems + 1, "`problems` of tile 0"),
        ("weights", np.ones(3), "`weights` of tile 0"),
    ):
        wrong = (tile._replace(**{name: value}), *problems.tiles[1:])
        refused(match, problems=problems._replace(tiles=wrong))
    for build in (kernels.one_vs_rest, kernels.one_vs_one, kernels.multinomial):
        for wrong in (labels + 0.5, labels.astype(str), labels[None], labels - 2):
            with pytest.raises(ValueError, match="`labels` must be"):
                build(wrong)
    with pytest.raises(ValueError, match="below `classes` = 1"):
        kernels.one_vs_rest(labels, classes=1)
    far = np.full((1, 3), 1e19, np.float32), np.zeros(1)
    assert np.asarray(kernels.fit_logistic(x, problems, start=far).converged).all()
    huge = jnp.asarray(x) * 1e30
    assert not np.asarray(kernels.fit_logistic(huge, problems).converged).all()
