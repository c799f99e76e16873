"""Settings of every test: eight virtual devices, shape annotations checked."""

import os

flags = os.environ.get("XLA_FLAGS", "")
if "device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jaxtyping.install_import_hook("jaxling.kernels", "beartype.beartype")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of the same numbers in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def float64():
    """The test runs with float64 enabled."""
    try:
        from jax.experimental import enable_x64 as enable
    except ImportError:
        from jax import enable_x64 as enable
    with enable(True):
        yield


@pytest.fixture
def agree(record_property):
    """Asserts that arrays agree, and records by how much they differ.

    `python -m experiments.benchmarks.parity` makes a table of what is recorded.
    """

    def check(part, ours, theirs, atol):
        np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)
        difference = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
        assert np.isfinite(difference), f"{part} is not finite"
        record_property(part, float(difference))

    return check
