"""Keys that outgrow the device: the same result, with two blocks there at a time."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxling import kernels
from jaxling.kernels import neighbors, visits

REDUCERS = {"lse": kernels.log_sum_exp(), "best": kernels.maximum()}


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_blocks_change_nothing(rng, tmp_path, metric):
    keys = rng.standard_normal((103, 8)).astype(np.float32)
    keys[40:60] = keys[2]
    keys[70, 0] = np.nan
    np.save(tmp_path / "keys.npy", keys)
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    queries = keys[::5]
    one = kernels.nearest_neighbors(queries, keys, k=30, metric=metric)
    found, proof = kernels.nearest_neighbors(
        queries, mapped, k=30, metric=metric, block=25, with_proof=True
    )
    np.testing.assert_allclose(found.scores, one.scores, rtol=1e-6, atol=2e-6)
    if metric == "l2":
        np.testing.assert_array_equal(found.indices, one.indices)
    assert proof.unproved.shape == (21,)


def test_blocks_over_a_mesh_and_none_at_all(rng, monkeypatch):
    x = rng.standard_normal((49, 8)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    one = kernels.nearest_neighbors(x, x, k=4)
    search, held = neighbors._meshed_nearest, []

    def noted(queries, keys, **knobs):
        held.extend(part.data.shape[0] for part in keys.addressable_shards)
        return search(queries, keys, **knobs)

    monkeypatch.setattr(neighbors, "_meshed_nearest", noted)
    found = kernels.nearest_neighbors(x, x, k=4, block=20, mesh=mesh)
    np.testing.assert_array_equal(found.indices, one.indices)
    assert held == [10, 10, 10, 10, 5, 5]  # no device ever has a whole block
    none = kernels.nearest_neighbors(x, x[:0], k=4, block=20)
    assert none.indices.shape == (49, 4) and (none.indices == -1).all()


def test_reductions_by_blocks(rng):
    queries, keys = (rng.standard_normal((n, 8)).astype(np.float32) for n in (9, 40))
    one = kernels.reduce_scores(queries, keys, REDUCERS)
    found = kernels.reduce_scores(queries, keys, REDUCERS, block=16)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one)):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    none = kernels.reduce_scores(queries, keys[:0], REDUCERS, block=16)
    assert (np.asarray(none["lse"]) == -np.inf).all()


class Watched(np.ndarray):
    """A matrix of the host that notes how much is on the device when it is read."""

    most = 0

    def __getitem__(self, index):
        # What is asked for arrives next to what is there.
        part = np.asarray(self)[index]
        self.most = max(self.most, live() + part.nbytes)
        return part


def live():
    return sum(x.nbytes for x in jax.live_arrays())


def test_the_next_block_is_read_before_one_is_searched():
    happened = []

    class Noted(np.ndarray):
        def __getitem__(self, index):
            happened.append(("read", index.start))
            return np.asarray(self)[index]

    def step(state, block, first):
        happened.append(("search", first))
        return state + block.sum()

    keys = np.arange(10, dtype=np.float32).reshape(5, 2)
    assert visits.visit(keys.view(Noted), 2, step, 0) == 45
    assert happened == [
        *(("read", 0), ("read", 2), ("search", 0), ("read", 4)),
        *(("search", 2), ("search", 4)),
    ]


@pytest.mark.parametrize("block", [256, 1024])
def test_the_block_caps_the_memory_of_the_device(rng, record_property, block):
    """All arrays that are there, and what the compiled step needs besides."""
    n, d, k = 64, 32, 4
    queries = rng.standard_normal((n, d)).astype(np.float32)
    keys = rng.standard_normal((16_384, d)).astype(np.float32)
    watched, before = keys.view(Watched), live()
    found = kernels.nearest_neighbors(queries, watched, k=k, block=block)
    one = kernels.nearest_neighbors(queries, keys, k=k)
    np.testing.assert_array_equal(found.indices, one.indices)
    step = neighbors._traced.lower(queries, keys[:block], k=k, metric="cosine")
    temporary = step.compile().memory_analysis().temp_size_in_bytes
    arrays = watched.most - before
    peak = arrays + temporary
    record_property("peak bytes", peak)
    print(f"{block} keys at a time: peak {peak:,} bytes of {keys.nbytes:,} of keys")
    # Two blocks and the queries; in the step their unit rows, scores and candidates.
    lists = 4 * n * 8 * k
    assert arrays <= 2 * block * d * 4 + queries.nbytes + lists
    assert temporary <= 6 * (block + n) * d * 4 + 8 * n * block * 4
    kept = kernels.reduce_scores(queries, keys.view(Watched), REDUCERS, block=block)
    np.testing.assert_allclose(
        kept["lse"], jax.nn.logsumexp(queries @ keys.T, axis=1), rtol=1e-5
    )


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"block": 0}, "`block`.*got 0"),
        ({"block": 2}, "traced"),
    ],
)
def test_bad_blocks_are_named(rng, knobs, message):
    x = rng.standard_normal((4, 3)).astype(np.float32)

    def find(x):
        return kernels.nearest_neighbors(x, x, k=1, **knobs)

    with pytest.raises(ValueError, match=message):
        jax.jit(find)(x) if knobs["block"] else find(x)
