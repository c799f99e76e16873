"""Ridge paths against scikit-learn, and left-out errors against leaving rows out."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from jaxling import kernels

L2 = np.array([0.1, 1.0, 30.0])


@pytest.mark.parametrize("n, d", [(40, 7), (12, 25), (9, 9)])
def test_every_penalty_reaches_scikit_learn(rng, n, d):
    x, y = rng.normal(size=(2, n, d)) + 3, rng.normal(size=(n, 2))
    path = kernels.ridge_path(np.float32(x), np.float32(y), l2=L2)
    for layer in range(2):
        for i, l2 in enumerate(L2):
            model = Ridge(alpha=l2).fit(x[layer], y)
            # Float32 through a squared condition number of about 1e4.
            np.testing.assert_allclose(path.weights[layer, i], model.coef_.T, atol=5e-4)
            np.testing.assert_allclose(
                path.intercepts[layer, i], model.intercept_, atol=5e-3
            )
            errors = []
            for row in range(n):
                rest = np.arange(n) != row
                model = Ridge(alpha=l2).fit(x[layer][rest], y[rest])
                errors.append(np.square(model.predict(x[layer][[row]])[0] - y[row]))
            np.testing.assert_allclose(
                path.leave_one_out[layer, i], np.mean(errors, axis=0), rtol=2e-3
            )


def test_one_target_and_layers_agree_with_each_other(rng):
    x, y = np.float32(rng.normal(size=(2, 20, 5))), np.float32(rng.normal(size=20))
    both = kernels.ridge_path(x, y, l2=L2)
    assert both.weights.shape == (2, 3, 5)
    one = kernels.ridge_path(x[1], y[:, None], l2=L2)
    np.testing.assert_allclose(both.weights[1], one.weights[..., 0], atol=1e-6)
    gradient = jax.grad(lambda y: kernels.ridge_path(x[0], y, l2=L2).weights.sum())(y)
    step = np.zeros(20, np.float32)
    step[3] = 1e-2
    ends = [
        float(kernels.ridge_path(x[0], y + s, l2=L2).weights.sum())
        for s in (step, -step)
    ]
    # The weights are linear in y; what differs is rounding over a step of 0.02.
    np.testing.assert_allclose(gradient[3], (ends[0] - ends[1]) / 2e-2, atol=1e-3)


def test_what_is_wrong_is_named(rng):
    x = np.zeros((4, 2), np.float32)
    for match, arguments in (
        (r"\[n, d\]", (x[0], np.zeros(4), L2)),
        ("n = 4", (x, np.zeros(3), L2)),
        ("`l2`", (x, np.zeros(4), 1.0)),
        ("> 0; got 0", (x, np.zeros(4), np.array([1.0, 0.0]))),
        ("> 0; got inf", (x, np.zeros(4), np.array([1.0, np.inf]))),
        ("> 0; got nan", (x, np.zeros(4), np.array([np.nan]))),
        ("must have rows", (x[:0], np.zeros(0), L2)),
        ("must have rows", (x[None, :0], np.zeros(0), L2)),
        ("`x` must be real", (x * 1j, np.zeros(4), L2)),
        ("`y` must be real", (x, np.zeros(4) * 1j, L2)),
        ("`l2` must be real", (x, np.zeros(4), L2 * 1j)),
    ):
        with pytest.raises(ValueError, match=match):
            kernels.ridge_path(*arguments[:2], l2=arguments[2])
