"""Folds and samples equal to scikit-learn's and imbalanced-learn's; planted signals."""

import numpy as np
import pytest
from imblearn.under_sampling import RandomUnderSampler
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score

from jaxling import probes


@pytest.mark.parametrize("classes, folds", [(2, 10), (5, 3)])
def test_folds_are_scikit_learns(rng, classes, folds):
    for n in (60, 101, 250):
        labels = rng.integers(classes, size=n) * 7 % 5
        labels[: folds * classes] = np.arange(folds * classes) % classes * 7 % 5
        ours = probes.stratified_folds(labels, folds)
        split = StratifiedKFold(folds).split(labels, labels)
        for f, (_, test) in enumerate(split):
            np.testing.assert_array_equal(np.flatnonzero(ours == f), test)
    with pytest.raises(ValueError, match="has 2 rows"):
        probes.stratified_folds([0, 0, 0, 1, 1], 3)
    for fold in (probes.stratified_folds, probes.folds_by_type):
        with pytest.raises(ValueError, match="`folds` must be an integer > 1; got 0"):
            fold([0, 0, 1, 1], 0)


@pytest.mark.parametrize("shares", [[0.9, 0.1], [0.3, 0.7], [0.5, 0.2, 0.3]])
def test_samples_are_imbalanced_learns(rng, shares):
    for n in (40, 333, 5000):
        labels = rng.choice(len(shares), p=shares, size=n)
        sampler = RandomUnderSampler(random_state=150)
        sampler.fit_resample(np.zeros((n, 1)), labels)
        np.testing.assert_array_equal(
            probes.undersample(labels), sampler.sample_indices_
        )
    equal = np.arange(20) % 2
    sampler = RandomUnderSampler(random_state=3)
    sampler.fit_resample(np.zeros((20, 1)), equal)
    np.testing.assert_array_equal(
        probes.undersample(equal, seed=3), sampler.sample_indices_
    )


def test_transfer_needs_layers(rng):
    with pytest.raises(ValueError, match=r"\[layer, n, d\]; got shape \(8, 3\)"):
        probes.transfer_by_layer(
            rng.normal(size=(8, 3)), ["a", "b"] * 4, ["x", "y"] * 4, np.arange(8)
        )


def test_the_papers_protocol_gives_scikit_learns_accuracies(rng):
    kinds = rng.choice(["A", "B", "C", "D"], p=[0.6, 0.2, 0.15, 0.05], size=900)
    centres = {kind: rng.normal(size=12) for kind in "ABCD"}
    x = np.stack([centres[kind] for kind in kinds]) + 2 * rng.normal(size=(900, 12))
    x = np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))
    tasks = probes.one_vs_rest_tasks(list(kinds), least=60)
    assert list(tasks) == ["A", "B", "C"]
    found = probes.cross_validate(x, tasks)
    assert bool(found.fit.converged.all())
    in_order = probes.cross_validate(x, list(tasks.values()))
    np.testing.assert_array_equal(found.scores.accuracy, in_order.scores.accuracy)
    for i, (name, task) in enumerate(tasks.items()):
        y = (kinds == name).astype(int)
        rows, y = RandomUnderSampler(random_state=150).fit_resample(x, y)
        theirs = cross_val_score(LogisticRegression(), rows, y, cv=10)
        # Theirs stop earlier: one row of a fold may fall on the other side.
        np.testing.assert_allclose(
            found.scores.accuracy[i], theirs, atol=1.5 / found.scores.rows[i].min()
        )
        assert len(task.rows) == len(y)
    records = probes.summary(tasks, found.scores.accuracy)
    assert records[0]["low"] < records[0]["mean"] < records[0]["high"]


def test_only_the_layer_with_the_signal_is_above_its_control(rng):
    n, d = 400, 8
    types = rng.integers(80, size=n)
    labels = (types % 2).astype(np.int64)
    x = rng.normal(size=(3, n, d)).astype(np.float32)
    x[1, :, 0] += 4 * labels
    folds = probes.folds_by_type(types, 5)
    for fold in range(5):
        assert not set(types[folds == fold]) & set(types[folds != fold])
    control = probes.control_labels(types, labels)
    assert all(len(set(control[types == kind])) == 1 for kind in set(types))
    rows = np.arange(n)
    tasks = [probes.Task(rows, labels), probes.Task(rows, control)]
    found = probes.cross_validate(x, tasks, folds=[folds, folds])
    mean = probes.over_folds(found.scores.balanced_accuracy).mean
    above = probes.selectivity(mean[:, 0], mean[:, 1])
    assert above[1] > 0.3 and abs(above[0]) < 0.2 and abs(above[2]) < 0.2


def test_layers_whose_labels_are_numbers_or_of_one_word(rng):
    n = 240
    types = rng.integers(40, size=n)
    labels = np.where(types == 7, 3, types % 2)
    labels[:10] = 2
    x = rng.normal(size=(2, n, 4)).astype(np.float32)
    x[1, :, 0] += 6 * (labels == 1)
    # Four rows would be enough of label 3, but all of them are in one fold.
    found = probes.probe_layers(x, labels, types, least=4)
    same = probes.probe_layers(x, [str(label) for label in labels], types, least=4)
    for ours, theirs in zip(
        found.accuracy + found.control, same.accuracy + same.control
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert {"0", "1"} <= set(found.names) and "3" not in found.names
    count = np.count_nonzero(labels == 3)
    assert found.left_out["3"] == f"{count} rows, a class of its task in one fold"
    i = found.names.index("1")
    assert found.accuracy.mean[1, i] > 0.9 and found.control.mean[1, i] < 0.75
    fewer = probes.probe_layers(x, labels, types, least=11)
    assert fewer.names == ["0", "1"] and fewer.left_out["2"] == "10 rows"
    with pytest.raises(ValueError, match=r"have 200 rows .* 2 \(10 rows\)"):
        probes.probe_layers(x, labels, types, least=200)


@pytest.mark.parametrize(
    "x, labels, types, match",
    [
        ((8, 3), 8, 8, r"`x` must be \[layer, n, d\]; got shape \(8, 3\)"),
        ((2, 8, 3), 7, 8, "`labels` must have one entry for each of the 8 .* got 7"),
        ((2, 8, 3), 8, 9, "`types` must have one entry for each of the 8 .* got 9"),
    ],
)
def test_layers_of_another_shape_are_refused(x, labels, types, match):
    given = [["a", "b"][i % 2] for i in range(labels)], np.arange(types) // 2
    with pytest.raises(ValueError, match=match):
        probes.probe_layers(np.zeros(x), *given, least=2, folds=2)


def test_entangled_pairs_and_transfer_find_what_was_planted(rng):
    n = 600
    kinds = np.array(["a", "b", "c"])[np.arange(n) % 3]
    x = rng.normal(size=(n, 6)).astype(np.float32)
    x[kinds == "c", 0] += 8
    matrix = probes.pairwise_accuracy(
        x, list(kinds), names=["a", "b", "c"], rows=150, folds=5
    )
    assert np.isnan(matrix[0, 0]) and matrix[0, 1] == matrix[1, 0]
    assert matrix[0, 1] < 0.65 and matrix[0, 2] > 0.97

    labels = rng.integers(2, size=n)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    x[:, 1] += np.where(kinds == "c", -6, 6) * labels  # c says the opposite
    names, transfer = probes.transfer_matrix(
        x, list(kinds), labels, np.arange(n), folds=4
    )
    assert names == ["a", "b", "c"]
    assert transfer[0, 1] > 0.9 and transfer[2, 2] > 0.9 and transfer[0, 2] < 0.6


def test_intervals():
    values = np.array([[0.8, 0.9, 0.85, 0.95], [1.0, 1.0, 1.0, 1.0]])
    interval = probes.over_folds(values)
    np.testing.assert_allclose(interval.mean, [0.875, 1.0])
    # t of 3 degrees at 97.5% is 3.18245.
    half = 3.18245 * values[0].std(ddof=1) * np.sqrt(1 / 4 + 1 / 3)
    np.testing.assert_allclose(0.875 - interval.low[0], half, rtol=1e-5)
    assert interval.high[0] == min(1, 0.875 + half)
    assert interval.low[1] == interval.high[1] == 1.0
    assert np.isnan(probes.over_folds(values[:, :1]).low).all()
