"""Several processes find what one finds; one that dies leaves what it has finished."""

import jax
import numpy as np
import processes
import pytest

from jaxling import kernels, sweeps

N, K = 45, 5

PROGRAM = """
    import time
    import numpy as np
    from jaxling import kernels, sweeps

    assert (jax.process_count(), jax.device_count()) == ({count}, {all})
    x = np.load({folder!r} + "/x.npy", mmap_mode="r")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("hosts",))
    read = []

    class Watched(np.ndarray):
        def __getitem__(self, index):
            read.append(index)
            return np.asarray(self).__getitem__(index)

    pairs = kernels.all_pairs_neighbors(x.view(Watched), k={k}, mesh=mesh)
    rows = [one[0].indices(10**6)[:2] for one in read]
    found = {{"scores": pairs.scores, "indices": pairs.indices}}
    some = kernels.nearest_neighbors(x[:3], x, k={k}, metric="l2", mesh=mesh)
    found["l2"] = some.scores
    lse = kernels.log_sum_exp(), kernels.count_above(np.zeros(len(x)))
    found["lse"], found["above"] = kernels.reduce_scores(x, x, lse, mesh=mesh)
    lens = kernels.project_layers(
        x[None, :7], x, k=2, targets=np.arange(7), mesh=mesh
    )
    found["top"], found["rank"] = lens.top_tokens, lens.target_ranks
    problems = kernels.one_vs_rest(np.arange(len(x)) % 3)
    found["weights"] = kernels.fit_logistic(x, problems, mesh=mesh).weights
    share = number, {count}
    swept = sweeps.sweep_neighbors(x, k={k}, panel=10, share=share, progress=False)
    # Collectives wait for 30 seconds; a process may need longer for its share.
    time.sleep(40 * (number == {late}))
    found["swept"] = sweeps.joined(swept).indices
    np.savez(f"{folder}/{{number}}.npz", read=rows, **found)
"""


@pytest.mark.parametrize(
    "count, devices", [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)]
)
def test_processes_find_what_one_does(rng, tmp_path, count, devices):
    x = rng.standard_normal((N, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    program = PROGRAM.format(
        count=count,
        all=count * devices,
        folder=str(tmp_path),
        k=K,
        late=1 if count > 2 else -1,
    )
    processes.run(program, count, devices)
    one = kernels.all_pairs_neighbors(x, k=K)
    covered = np.zeros(count * devices * 12, int)
    for number in range(count):
        found = np.load(tmp_path / f"{number}.npz")
        np.testing.assert_array_equal(found["indices"], one.indices)
        np.testing.assert_array_equal(found["swept"], one.indices)
        np.testing.assert_allclose(found["scores"], one.scores, atol=3e-7)
        # 45 rows in 4 even parts of 12; of the map each process reads its own.
        for a, b in found["read"]:
            assert 12 * devices * number <= a < b <= 12 * devices * (number + 1)
            covered[a:b] += 1
        l2 = kernels.nearest_neighbors(x[:3], x, k=K, metric="l2")
        np.testing.assert_allclose(found["l2"], l2.scores, rtol=1e-6)
        lse = jax.nn.logsumexp(x @ x.T, axis=1)
        np.testing.assert_allclose(found["lse"], lse, rtol=1e-6)
        np.testing.assert_array_equal(found["above"], (x @ x.T > 0).sum(axis=1))
        scores = x[:7] @ x.T
        order = np.argsort(-scores, axis=1)
        np.testing.assert_array_equal(found["top"][0], order[:, :2])
        own = scores[np.arange(7), np.arange(7)][:, None]
        np.testing.assert_array_equal(
            found["rank"][0, :, 0], (scores > own).sum(axis=1)
        )
        fit = kernels.fit_logistic(x, kernels.one_vs_rest(np.arange(N) % 3))
        np.testing.assert_allclose(found["weights"], fit.weights, atol=1e-4)
    assert (covered[:N] > 0).all()


def test_a_share_is_a_part_and_all_shares_are_the_whole(rng):
    """In one process: the shares' lists, merged, are those of the whole sweep."""
    x = rng.standard_normal((N, 6)).astype(np.float32)
    for rows in (None, np.arange(0, N, 4)):
        whole = sweeps.sweep_neighbors(x, k=K, rows=rows, panel=10, progress=False)
        merged = None
        for number in range(3):
            part = sweeps.sweep_neighbors(
                x, k=K, rows=rows, panel=10, share=(number, 3), progress=False
            )
            assert not np.array_equal(part.indices, whole.indices)
            part = kernels.Neighbors(part.scores, part.indices)
            merged = part if merged is None else kernels.merge_neighbors(merged, part)
        np.testing.assert_array_equal(merged.indices, whole.indices)
    with pytest.raises(ValueError, match=r"`share`.*\(3, 3\)"):
        sweeps.sweep_neighbors(x, k=K, share=(3, 3))


def test_all_devices_of_a_process_take_part(rng, monkeypatch):
    x = rng.standard_normal((N, 6)).astype(np.float32)
    used, panel = set(), sweeps._panel

    def watched(task, start, device):
        used.add(device)
        return panel(task, start, device)

    monkeypatch.setattr(sweeps, "_devices", lambda: jax.local_devices()[:3])
    monkeypatch.setattr(sweeps, "_panel", watched)
    for rows in (None, np.arange(0, N, 2)):
        found = sweeps.sweep_neighbors(x, k=K, rows=rows, panel=8, progress=False)
        whole = np.asarray(kernels.all_pairs_neighbors(x, k=K).indices)
        lines = slice(None) if rows is None else rows
        np.testing.assert_array_equal(found.indices, whole[lines])
    assert used == set(jax.local_devices()[:3])
