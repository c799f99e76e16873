"""How far from the bare product is everything, on one accelerator?

    python -m experiments.benchmarks.gpu --case=neighbors

Cases, each one interleaved run on one device:
  neighbors  all pairs, k = 50, at 131,072 and 250,000 rows of 1,024 and 4,096 columns:
             beside the bare bfloat16 product, the float32 product of default precision
             (TF32 on Hopper), torch `matmul` + `topk`, chunked `lax.top_k` with and
             without stable order, FlashLib's `flash_knn`, and two kernels on trial
             (Hopper alone): `mosaic`, and `mosaic_symmetric`, which makes half of the
             products
  probes     2,175 probes (435 pairs x 5 seeds) beside scikit-learn on all processors
  lens       32 layers x 2,048 positions, 128,256 tokens of 4,096, beside a loop over
             full logits in torch; and log-sum-exp with entropy alone (`ours_entropy`)
             beside a kernel on trial (`mosaic`) and the bare product

Each goal (G1-G7, GP, GL) is a ratio of medians of that one run, printed with what it
asks for. Rows are on the device before anything is timed; every list has the row itself
in it (`include_self=True`), as the lists of the others have. Neighbours are compared
with float64 on 512 rows, among them planted copies. The goals are about bfloat16 rows:
with `--row_dtype=float32` ours and the kernels on trial are given wider ones, and the
others multiply what they always do. A contestant that is not installed, or whose first
call raises, is left out by its name, with the reason in the record. One line of
`results.jsonl` a size.

The kernels on trial are to be measured in one sitting of 15 minutes, of which the
machine's start takes some. First whether they compile and are exact (3 minutes; each by
itself, as one that stands still or reads where it may not takes the others with it).
Then their goals on one size (2), on all of them (5), where torch and the sorts are left
out, and in the lens (2); what is left is for ours on float32 rows and for tiles. Only
what passed the first is named in the rest:

    run="python -m experiments.benchmarks.gpu"
    for name in mosaic mosaic_symmetric; do
        timeout 90 $run --contestants=$name --rows=16384 --columns=1024 --repeats=1
    done
    timeout 90 $run --case=lens --lens=2,2048,4096,128256 --repeats=1 \
        --contestants=mosaic,ours_entropy
    timeout 150 $run --contestants=mosaic,mosaic_symmetric,product,square,torch \
        --rows=131072 --columns=1024 --repeats=3
    timeout 300 $run --contestants=mosaic,mosaic_symmetric,product,square --repeats=3
    timeout 120 $run --case=lens --contestants=mosaic,ours_entropy,product --repeats=3
    timeout 60 $run --contestants=product,product_f32 \
        --rows=131072 --columns=1024 --repeats=3 --row_dtype=float32
    timeout 60 $run --contestants=mosaic_symmetric,product,square \
        --rows=131072 --columns=1024 --repeats=3 --tiles=64,256,64,3,32,1024

One wins where its goals G1 and G7 (in the lens `GL mosaic`) are met and its worst error
is that of ours. `MOSAIC_GPU_DUMP_PTXAS=1` before the first shows whether registers
spill.

Estimated, not measured, from the instructions that the compiler made and what a
multiprocessor issues in a clock: 2,048 of the product's multiply-adds, 128 other
multiply-adds, 64 of a maximum, a selection or an operation on bits, 128 bytes of shared
memory. A tile of 128 x 256 takes 16 clocks a column in the product. Its epilogue by
rows (5 maxima, 1 on bits, 1 multiply-add a score) takes 3,300 clocks, during which the
product stands still; by columns (1 selection more) 3,800, and up to 2,000 to go through
shared memory. In clocks per pair of tiles that mirror each other:

    columns   product      full walk    symmetric
    1,024     2 x 16,400   2 x 19,700      25,600   0.65 of the full walk
    4,096     2 x 65,500   2 x 68,900      74,700   0.54

With a bare product at 75% of the peak, and 85% of it between epilogues, 250,000 rows of
1,024 columns are 0.12 s beside 0.17 s, those of 4,096 are 0.35 s beside 0.69 s. What
XLA does afterwards is the same in both walks: at least 16 GB of maxima are read and 66
candidates a row, 34 and 135 GB, hence 0.01 and 0.04 s more. So `mosaic_symmetric` may
reach 0.75 and 0.57 of the product's time (G1), and `mosaic` 1.1 and 1.0.
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from jaxling import kernels

from . import harness

_CASE = flags.DEFINE_enum(
    "case", "neighbors", ["neighbors", "probes", "lens"], "What is timed."
)
_ROWS = flags.DEFINE_multi_integer("rows", [131_072, 250_000], "Rows.", 64)
_COLUMNS = flags.DEFINE_multi_integer("columns", [1024, 4096], "Columns.", 1)
_ROW_DTYPE = flags.DEFINE_enum(
    "row_dtype", "bfloat16", ["bfloat16", "float32"], "Of the rows that ours is given."
)
_K = flags.DEFINE_integer("k", 50, "Neighbours.", 1)
_CHUNK = flags.DEFINE_integer("chunk", 2048, "Rows whose scores are held together.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Interleaved repetitions.", 1)
_SQUARE = flags.DEFINE_integer("square", 8192, "Side of the product of the rate.", 1)
_CONTESTANTS = flags.DEFINE_list("contestants", [], "Which of them; all if none.")
_TILES = flags.DEFINE_list(
    "tiles", [], "Sizes of the kernel on trial, as in its TuningConfig."
)
_LENS = flags.DEFINE_list(
    "lens", ["32", "2048", "4096", "128256"], "Layers, positions, width, vocabulary."
)
_PROBES = flags.DEFINE_list(
    "probes", ["30", "200", "768", "5"], "Classes, rows of each, columns, seeds."
)

# Goal: what it divides by what, and what it is to reach (at most or at least).
GOALS = {
    "G1": ("ours", "product", "at most", 1.9),
    "G2": ("torch", "ours", "at least", 2.0),
    "G3": ("top_k", "ours", "at least", 5.0),
    "G4": ("top_k_any_order", "ours", "at least", 1.5),
    "G5": ("flashlib", "ours", "at least", 1.0),
    "G6": ("ours", "product_f32", "at most", 1.3),
    "G1 mosaic": ("mosaic", "product", "at most", 1.25),
    "G2 mosaic": ("torch", "mosaic", "at least", 2.0),
    "G3 mosaic": ("top_k", "mosaic", "at least", 5.0),
    "G4 mosaic": ("top_k_any_order", "mosaic", "at least", 1.5),
    "G5 mosaic": ("flashlib", "mosaic", "at least", 1.0),
    "G6 mosaic": ("mosaic", "product_f32", "at most", 1.3),
    "G1 mosaic_symmetric": ("mosaic_symmetric", "product", "at most", 0.65),
    "G2 mosaic_symmetric": ("torch", "mosaic_symmetric", "at least", 4.0),
    "G3 mosaic_symmetric": ("top_k", "mosaic_symmetric", "at least", 10.0),
    "G4 mosaic_symmetric": ("top_k_any_order", "mosaic_symmetric", "at least", 3.0),
    "G5 mosaic_symmetric": ("flashlib", "mosaic_symmetric", "at least", 2.0),
    "G6 mosaic_symmetric": ("mosaic_symmetric", "product_f32", "at most", 0.7),
    "GP": ("sklearn", "ours", "at least", 50.0),
    "GL": ("torch", "ours", "at least", 1.3),
    "GL mosaic": ("ours_entropy", "mosaic", "at least", 1.3),
    "GL mosaic's product": ("mosaic", "product", "at most", 1.25),
}
# Searches, and what share of the rate of a square product each is asked for (G7).
_RATES = {"ours": 0.8, "mosaic": 0.8, "mosaic_symmetric": 1.5}


def unit_rows(n: int, d: int) -> np.ndarray:
    """Rows around 3,000 centres; some are copies, which are ties."""
    rng = np.random.default_rng(0)
    rows = 0.8 * rng.standard_normal((n, d), np.float32)
    rows += 0.6 * rng.standard_normal((3000, d), np.float32)[rng.integers(0, 3000, n)]
    rows[n // 4 : n // 4 + 20] = rows[3]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def chunked(
    function: Callable[[Any, Any], Any], x: jax.Array, keys: jax.Array | None = None
) -> Callable[[], Any]:
    """`function(rows, keys)` of all rows, some at a time; the last ones may be few.

    The keys are the rows themselves if there are no others.
    """
    step = jax.jit(
        lambda x, keys, start, size: function(
            lax.dynamic_slice_in_dim(x, start, size), keys
        ),
        static_argnames="size",
    )
    size = min(_CHUNK.value, len(x))
    keys = x if keys is None else keys

    def call():
        starts = range(0, len(x), size)
        found = [step(x, keys, a, size=min(size, len(x) - a)) for a in starts]
        return jax.block_until_ready(found)

    return call


def scores(rows: Any, keys: Any, precision: Any = None) -> jax.Array:
    """All scores, accumulated in float32."""
    return lax.dot_general(
        *(rows, keys),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def greatest(rows: Any, keys: Any) -> jax.Array:
    """Of the scores of each row: what a product costs that leaves next to nothing."""
    return scores(rows, keys).max(axis=1)


def tiles() -> Any:
    """Of the kernels on trial, as `--tiles` says; None if it says nothing."""
    from . import mosaic_product

    given = map(int, _TILES.value)
    return mosaic_product.TuningConfig(*given) if _TILES.value else None


def torch_top_k(x: np.ndarray) -> Callable[[], Any]:
    """`matmul` and `topk` of bfloat16 rows, some at a time."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.tensor(x).to(device, torch.bfloat16)

    def call():
        with torch.inference_mode():
            for chunk in rows.split(_CHUNK.value):
                found = (chunk @ rows.T).topk(_K.value)
            if device == "cuda":
                torch.cuda.synchronize()
        return found

    return call


def flashlib_top_k(x: np.ndarray) -> Callable[[], Any]:
    """FlashLib's k nearest by squared distance, whose order unit rows share.

    https://github.com/FlashML-org/flashlib, `flashlib/primitives/knn/impl.py`.
    """
    import torch
    from flashlib import flash_knn

    rows = torch.tensor(x).to("cuda", torch.bfloat16)

    def call():
        found = flash_knn(rows, rows, _K.value)
        torch.cuda.synchronize()
        return found

    return call


def timed(
    contestants: dict[str, Callable[[], Callable]],
) -> tuple[dict[str, harness.Timing], dict[str, Any], dict[str, Any]]:
    """Timings, results, and for the record who of those asked for was left out."""
    made: dict[str, Callable] = {}
    left_out: dict[str, str] = {}
    for name, make in contestants.items():
        if name != "ours" and _CONTESTANTS.value and name not in _CONTESTANTS.value:
            continue
        try:
            made[name] = make()
        except Exception as error:  # no such package, or no room for its rows
            left_out[name] = harness.reason(error)
    timings, results = harness.interleaved(made, _REPEATS.value, left_out)
    return timings, results, {"left out": left_out} if left_out else {}


def goals(timings: dict[str, harness.Timing], names: list[str]) -> dict[str, Any]:
    """Those goals whose two contestants took part: the ratio, and what was asked."""
    found = {}
    for name in names:
        above, below, side, asked = GOALS[name]
        if {above, below} <= set(timings):
            ratio = timings[above].median / timings[below].median
            found[f"{name} {above} / {below} ({side} {asked})"] = round(ratio, 3)
    return found


def worst_error(x: np.ndarray, found: kernels.Neighbors) -> float:
    """Largest gap of returned scores, and of returned ids' scores, to float64's."""
    k = found.indices.shape[1]
    rows = np.random.default_rng(1).choice(len(x), min(512, len(x)), replace=False)
    rows[:4] = np.arange(len(x) // 4, len(x) // 4 + 4)
    exact = x[rows].astype(np.float64) @ x.astype(np.float64).T
    size = np.linalg.norm(x.astype(np.float64), axis=1)
    exact /= size[rows, None] * size
    best = -np.sort(np.partition(-exact, k - 1, axis=1)[:, :k], axis=1)
    theirs = np.take_along_axis(exact, np.asarray(found.indices)[rows], axis=1)
    gaps = np.asarray(found.scores)[rows] - best, theirs - best
    return float(max(np.abs(gap).max() for gap in gaps))


def neighbors(n: int, d: int) -> None:
    """All contestants on one size."""
    x = jnp.asarray(unit_rows(n, d), _ROW_DTYPE.value)
    narrow = x.astype(jnp.bfloat16)
    host, k = np.asarray(x.astype(jnp.float32)), _K.value
    square = jnp.ones((_SQUARE.value,) * 2, jnp.bfloat16)
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type="float32"))

    find = functools.partial(
        kernels.all_pairs_neighbors, k=k, include_self=True, with_proof=True
    )
    # Compiled in the first call, and once: its memory is read off the same program.
    program = functools.cache(lambda: jax.jit(find).lower(x).compile())

    def ours():
        return jax.block_until_ready(program()(x))

    def top_k(**knobs):
        return chunked(lambda rows, x: lax.top_k(scores(rows, x), k, **knobs), narrow)

    def top_k_any_order():
        if "is_stable" not in inspect.signature(lax.top_k).parameters:
            raise ImportError("this jax has no `is_stable`")
        return top_k(is_stable=False)

    def mosaic():
        return on_trial(symmetric=False)

    def mosaic_symmetric():
        return on_trial(symmetric=True)

    def on_trial(symmetric):
        from . import mosaic_gpu, mosaic_product

        find = functools.partial(
            mosaic_gpu.all_pairs_neighbors,
            k=k,
            symmetric=symmetric,
            config=tiles(),
            blocks=mosaic_product.check_device(),
        )
        return lambda: jax.block_until_ready(find(x))

    timings, results, found = timed(
        {
            "ours": lambda: ours,
            "mosaic": mosaic,
            "mosaic_symmetric": mosaic_symmetric,
            "product": lambda: chunked(greatest, narrow),
            "product_f32": lambda: chunked(greatest, x.astype(jnp.float32)),
            "torch": lambda: torch_top_k(host),
            "top_k": top_k,
            "top_k_any_order": top_k_any_order,
            "flashlib": lambda: flashlib_top_k(host),
            "square": lambda: lambda: jax.block_until_ready(multiply(square, square)),
        }
    )
    for name in [name for name in _RATES if name in results]:
        of = "" if name == "ours" else f" {name}"
        lists, proof = results[name]
        found |= goals(timings, [f"G{number}{of}" for number in range(1, 7)])
        if "square" in timings:
            rate = 2 * _SQUARE.value**3 / timings["square"].median
            own = 2 * n**2 * d / timings[name].median
            found["rate of the square product, TFLOP/s"] = round(rate / 1e12, 3)
            asked = f"at least {_RATES[name]}"
            found[f"G7{of} 2 N^2 d / time / that ({asked})"] = round(own / rate, 3)
        found[f"worst error of {name}"] = float(f"{worst_error(host, lists):.2e}")
        again = float(f"{proof.unproved.mean():.5f}")
        found[f"share of rows{of} searched again"] = again
    if "ours" in results and (memory := program().memory_analysis()) is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        found["MiB of our program: rows and results"] = round(held / 2**20, 1)
        temporary = memory.temp_size_in_bytes
        found["MiB of our program: temporaries"] = round(temporary / 2**20, 1)
    case = {"case": "neighbors", "rows": n, "columns": d, "k": k}
    case |= {"row_dtype": _ROW_DTYPE.value, "include_self": True}
    harness.record("gpu", case, timings, found)


def peak() -> int | None:
    """Most that jax held at a time since the process began; None where unknown."""
    stats = jax.local_devices()[0].memory_stats()
    return round(stats["peak_bytes_in_use"] / 2**20) if stats else None


def probes() -> None:
    """One-vs-one probes over seeds beside scikit-learn on all processors."""
    classes, size, d, seeds = map(int, _PROBES.value)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), size)
    x = rng.standard_normal((classes, d), np.float32)[labels] / np.sqrt(d)
    x += rng.standard_normal(x.shape, np.float32) * np.float32(2 / np.sqrt(d))
    keep = rng.random((seeds, len(labels))) < 0.9
    problems = kernels.one_vs_one(labels, keep=keep)
    on_device = jnp.asarray(x)

    def ours():
        return jax.block_until_ready(kernels.fit_logistic(on_device, problems))

    def sklearn():
        import joblib
        from sklearn.linear_model import LogisticRegression

        tasks = [
            (rows, labels[rows] == b)
            for kept in keep
            for a, b in zip(*np.triu_indices(classes, 1))
            for rows in [np.flatnonzero(kept & ((labels == a) | (labels == b)))]
        ]

        def one(rows, side):
            return LogisticRegression().fit(x[rows], side).coef_[0]

        return lambda: joblib.Parallel(n_jobs=os.cpu_count())(
            joblib.delayed(one)(*task) for task in tasks
        )

    timings, results, found = timed({"ours": lambda: ours, "sklearn": sklearn})
    found |= goals(timings, ["GP"])
    if "ours" in results:
        found["share converged"] = float(results["ours"].converged.mean())
    if {"ours", "sklearn"} <= set(results):
        gap = np.asarray(results["ours"].weights) - np.array(results["sklearn"])
        found["largest difference of weights"] = float(f"{np.abs(gap).max():.2e}")
    case = {"case": "probes", "problems": problems.count, "rows": len(x), "columns": d}
    harness.record("gpu", case, timings, found)


def lens() -> None:
    """Top 10, rank, entropy and KL of every layer beside a loop over full logits."""
    layers, n, d, vocab = map(int, _LENS.value)
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[0], (layers, n, d), jnp.bfloat16)
    unembed = jax.random.normal(keys[1], (vocab, d), jnp.bfloat16) * 0.05
    targets = jnp.arange(n) % vocab
    k = min(10, vocab)

    def ours():
        asked = {"k": k, "entropy": True, "divergence": True, "targets": targets}
        return jax.block_until_ready(kernels.project_layers(hidden, unembed, **asked))

    def ours_entropy():
        project = functools.partial(kernels.project_layers, entropy=True)
        return lambda: jax.block_until_ready(project(hidden, unembed))

    def mosaic():
        from . import mosaic_lens, mosaic_product

        predict = functools.partial(
            mosaic_lens.predictions,
            config=tiles() or mosaic_product.DEFAULT,
            blocks=mosaic_product.check_device(),
        )
        return lambda: jax.block_until_ready(predict(hidden, unembed))

    def torch():
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        rows, matrix = (
            torch.tensor(np.asarray(a, np.float32)).to(device, torch.bfloat16)
            for a in (hidden, unembed)
        )
        own = torch.tensor(np.array(targets)).to(device).long()[:, None]

        def layer(rows, final):
            logits = (rows @ matrix.T).float()
            log_p = torch.log_softmax(logits, -1)
            final = log_p if final is None else final
            target = logits.gather(-1, own)
            return log_p, (
                log_p.topk(k),
                (logits > target).sum(-1),
                -(log_p.exp() * log_p).sum(-1),
                (final.exp() * (final - log_p)).sum(-1),
            )

        def call():
            with torch.inference_mode():
                final, last = layer(rows[-1], None)
                found = [*(layer(one, final)[1] for one in rows[:-1]), last]
                if device == "cuda":
                    torch.cuda.synchronize()
            return found

        return call

    timings, results, found = timed(
        {
            "ours": lambda: ours,
            "ours_entropy": ours_entropy,
            "mosaic": mosaic,
            "product": lambda: chunked(greatest, hidden.reshape(-1, d), unembed),
            "torch": torch,
        }
    )
    found |= goals(timings, ["GL", "GL mosaic", "GL mosaic's product"])
    found["dense float32 logits, MiB"] = round(4 * layers * n * vocab / 2**20)
    held = [hidden, unembed, *jax.tree.leaves(results.get("ours"))]
    found["MiB of inputs and results"] = round(sum(a.nbytes for a in held) / 2**20)
    if not {"ours_entropy", "mosaic", "product"} & set(timings):
        # Of one size, and torch has an allocator of its own: it is ours.
        found["peak MiB of jax"] = peak()
    if {"ours", "torch"} <= set(results):
        entropies = np.stack([layer[2].cpu().numpy() for layer in results["torch"]])
        gap = np.abs(entropies - np.asarray(results["ours"].entropy)).max()
        found["largest difference of entropies"] = float(f"{gap:.2e}")
    if {"ours_entropy", "mosaic"} <= set(results):
        for name in ("log_sum_exp", "entropy"):
            pair = [getattr(results[who], name) for who in ("ours_entropy", "mosaic")]
            gap = float(jnp.abs(pair[0] - pair[1]).max())
            found[f"largest difference of mosaic's {name}"] = float(f"{gap:.2e}")
    shape = {"layers": layers, "positions": n, "columns": d, "tokens": vocab}
    harness.record("gpu", {"case": "lens", **shape}, timings, found)


def main(argv: list[str]) -> None:
    del argv
    # torch needs room beside jax; read when the first array is made.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if _CASE.value == "neighbors":
        for n in _ROWS.value:
            for d in _COLUMNS.value:
                neighbors(n, d)
    else:
        {"probes": probes, "lens": lens}[_CASE.value]()


if __name__ == "__main__":
    app.run(main)
