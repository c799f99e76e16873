"""Settings of every test: eight virtual devices, shape annotations checked."""

import os
import pathlib

flags = os.environ.get("XLA_FLAGS", "")
if "device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jaxtyping.install_import_hook("jaxling.kernels", "beartype.beartype")


_MAPS = pathlib.Path("/proc/self/maps")
_MANY = 20_000  # Linux allows a process 65,530


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Drops compiled programs before their memory maps run out.

    Every program has a few; a worker that meets a thousand tests without this is killed
    by a map that the compiler could not get.
    """
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()


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


@pytest.fixture
def agree_in_gradients(agree):
    """Asserts that the gradients of all parameters agree with those of a torch model.

    `gradients` is the state that `nnx.grad` gives for `model`, a loaded checkpoint of
    `oracle`, whose backward pass has run. Differences are relative to the largest entry
    of the tensor, for gradients add up the noise of every position; or, where a tensor
    has hardly any gradient (a key's bias adds the same to all scores of a query, and
    softmax drops it), to a hundredth of the largest of all.
    """
    from flax import nnx

    from jaxling import models
    from jaxling.models import conversion

    def check(model, gradients, oracle, atol):
        whole = nnx.merge(nnx.graphdef(model), nnx.state(gradients))
        family = models.FAMILIES[model.config["model_type"]]
        ours = conversion.tensors(whole, family)
        for name, _ in oracle.named_buffers():  # torch does not train these
            ours.pop(name, None)
        theirs = {
            name: parameter.grad.numpy()
            for name, parameter in oracle.named_parameters()
            if parameter.grad is not None
        }
        if "embed_out.weight" in ours:  # the file's name of it, not the module's
            theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
        if not set(theirs) <= set(ours):  # a model without its head has no prefix
            prefix = oracle.base_model_prefix
            theirs = {f"{prefix}.{name}": value for name, value in theirs.items()}
        assert set(ours) == set(theirs)
        largest = max(np.abs(value).max() for value in theirs.values())
        for name, value in theirs.items():
            own = np.abs(value).max()
            assert own > 0, name
            scale = max(own, 1e-2 * largest)
            agree("gradient", ours[name] / scale, value / scale, atol)

    return check


@pytest.fixture
def interpreter():
    """Settings that run a kernel for GPUs on a CPU; asserts that it had no race.

    Give it two blocks at most: each of their six warpgroups takes a thread of the
    device while it waits, and there are eight, or as many as processors if more.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the interpreter of this jax cannot multiply by a transposed array")
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    yield plgpu.InterpretGPUParams(detect_races=True)
    races = interpret_pallas_call.get_races()
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert not races.races_found
