"""Neighbour lists of matrices that outgrow memory, in bands that survive a crash.

The rows are cut into panels. Band `j` brings panel `j` in: every earlier row looks for
neighbours among its rows, and its rows among all so far, so that a pair of panels is
scored once for both sides. No row is final before the last band; the running
neighbours of all rows are the state. It is saved after each band, in one file that is
either the old state or the new one, with a checksum over everything in it.

Pairs of panels can be shared out over processes: each has running neighbours of its
own, saves them by itself, and only at the end are they merged.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from jaxling import kernels

PANEL = 16_384
_JOINED = 16_384  # rows whose neighbours processes exchange together
_LEAVE = 5  # seconds in which the others end
_BLOCK = 1 << 24  # bytes of the matrix looked at together on the host


class Sweep(NamedTuple):
    """Finished neighbour lists on the host, and what it took to get them.

    `scores` and `indices` are `[rows, k]`, best first, as from `nearest_neighbors`;
    `resumed` counts the bands that were read back rather than computed, `rate` the
    scores computed per second in the others, compilation included (0 without any).
    """

    scores: np.ndarray
    indices: np.ndarray
    bands: int
    resumed: int
    rate: float


def environment() -> dict[str, Any]:
    """What a saved state must have in common with the sweep that goes on from it."""
    return {
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "device": jax.devices()[0].device_kind,
    }


def invalid_rows(matrix: np.ndarray) -> np.ndarray:
    """Ids of the rows that have no direction: not finite, or of length zero.

    They are nobody's neighbours and have none. Reads `matrix` `[n, d]` block by block.
    """
    found = [
        start + np.flatnonzero(~np.isfinite(largest) | (largest == 0))
        for start, block in _blocks(matrix)
        for largest in [np.abs(block.astype(np.float32)).max(axis=1, initial=0.0)]
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])


def identity(matrix: np.ndarray) -> str:
    """SHA-256 of shape, dtype and values. Reads `matrix` `[n, d]` block by block."""
    digest = hashlib.sha256(f"{matrix.shape} {matrix.dtype}\n".encode())
    for _, block in _blocks(matrix):
        digest.update(np.ascontiguousarray(block).tobytes())
    return digest.hexdigest()


def _blocks(matrix: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    _check_matrix(matrix)
    step = max(1, _BLOCK // max(1, matrix.shape[1] * matrix.dtype.itemsize))
    for start in range(0, len(matrix), step):
        yield start, matrix[start : start + step]


def sweep_neighbors(
    matrix: np.ndarray,
    *,
    k: int,
    metric: str = "cosine",
    rows: np.ndarray | None = None,
    skip: np.ndarray | None = None,
    path: str | os.PathLike | None = None,
    matrix_identity: str | None = None,
    panel: int = PANEL,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Sweep:
    """The `k` nearest other rows of each row of `matrix`, or of those in `rows`.

    Equal, to float32 rounding, to `all_pairs_neighbors(matrix, k=k, metric=metric)`
    (with `rows`: to those lines of it), but at most three panels of the matrix are on
    a device at a time, one of them on its way while another is searched, and `matrix`
    may be a memory map that is larger than memory. On accelerators all devices of this
    process take part.

    Args:
      matrix: `[n, d]`, any real floating dtype.
      k: how many neighbours; a row is not its own.
      metric: `cosine`, `dot` or `l2`, as in `nearest_neighbors`.
      rows: ids of the rows to find neighbours for, ascending; all when None.
      skip: ids of rows to treat as absent: nobody's neighbours, and without any.
      path: the state's file. When it exists and was made for the same computation,
        the sweep goes on after the last saved band; when it is damaged, the sweep
        begins again. None keeps no state.
      matrix_identity: what tells `matrix` from others, `identity(matrix)` when None:
        pass it where it is known already.
      panel: rows of `matrix` that are brought in together.
      share: number and count of the processes that share the work: this one does its
        part of the pairs of panels, and `joined` merges what all of them found. Its
        state is in a file of its own, beside `path`.
      progress: shows scores per second and the time left on standard error.

    Raises:
      ValueError: an argument breaks its rule, or `path` holds the state of another
        computation.
      OSError: the state cannot be written. The state saved last is still there.
    """
    _check_matrix(matrix)
    n = len(matrix)
    for name, number in (("k", k), ("panel", panel)):
        if type(number) is bool or not isinstance(number, int | np.integer):
            raise ValueError(f"`{name}` must be an integer; got {number!r}.")
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1; got {number}.")
    k, panel = int(k), int(panel)  # NumPy's are not JSON
    if not 0 <= share[0] < share[1]:
        raise ValueError(f"`share` must be a number below a count; got {share}.")
    rows, skip = _ids("rows", rows, n), _ids("skip", skip, n)
    task = _Task(matrix, rows, skip, k, metric, min(panel, n), share)
    path = None if path is None else pathlib.Path(path)
    if path and share[1] > 1:
        path = path.with_name(f"{path.name}.{share[0]}-of-{share[1]}")
    inputs = {}
    if path:
        inputs = {
            "matrix": matrix_identity or identity(matrix),
            "rows": _digest(task.rows),
            "skip": _digest(task.skip),
            "k": k,
            "metric": metric,
            "panel": task.panel,
            "share": list(share),
            **environment(),
        }
    shape = (n if task.rows is None else len(task.rows), k)
    resumed, best = (path and _load(path, inputs, shape)) or (
        0,
        _Lists(np.full(shape, np.nan, np.float32), np.full(shape, -1, np.int32)),
    )
    starts = range(0, n, max(task.panel, 1))
    work = [
        sum(_cost(task, first, at) for at in _steps(task, first)) for first in starts
    ]
    began = time.monotonic()
    with tqdm.tqdm(
        total=sum(work),
        initial=sum(work[:resumed]),
        desc="neighbours",
        unit=" scores",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for band in range(resumed, len(starts)):
            for scores in _band(task, starts[band], best):
                bar.update(scores)
                _give_back()
            if path:
                _save(path, inputs, band + 1, best)
    seconds = time.monotonic() - began
    rate = sum(work[resumed:]) / seconds if seconds > 0 else 0.0
    return Sweep(best.scores, best.indices, len(starts), resumed, rate)


def joined(sweep: Sweep, metric: str = "cosine") -> Sweep:
    """The neighbours among the shares of all processes, on each of them.

    Every process calls this with the `Sweep` of its share. `bands`, `resumed` and
    `rate` are the sums over all.

    Raises:
      ConnectionError: another process is gone.
    """
    if jax.process_count() == 1:
        return sweep
    merge = functools.partial(kernels.merge_neighbors, metric=metric)
    scores, indices = sweep.scores.copy(), sweep.indices.copy()
    try:
        _wait_for_all()
        bands, resumed, rate = multihost_utils.process_allgather(
            np.array([sweep.bands, sweep.resumed, sweep.rate], np.float32)
        ).sum(axis=0)
        for start in range(0, len(scores), _JOINED):
            here = slice(start, start + _JOINED)
            shares = multihost_utils.process_allgather((scores[here], indices[here]))
            merged = functools.reduce(
                merge,
                [kernels.Neighbors(*map(jnp.asarray, one)) for one in zip(*shares)],
            )
            scores[here], indices[here] = map(np.asarray, merged)
    except (RuntimeError, multihost_utils.ProcessFailureError) as error:
        if jax.process_index() == 0:
            # The others end first: jax aborts those that its first process leaves.
            time.sleep(_LEAVE)
        raise ConnectionError(
            "Another process of this job is gone, so that its neighbours could not be"
            " fetched. What each had finished is saved; the same command goes on from"
            f" there. ({str(error).splitlines()[0][:200]})"
        ) from error
    return Sweep(scores, indices, int(bands), int(resumed), float(rate))


def _wait_for_all() -> None:
    """Until every process is here, however long: collectives give up after 30 seconds.

    Raises:
      RuntimeError: a process is gone, and it was this job's to go on without it
        (`jax_enable_recoverability`); jax ends the job otherwise.
    """
    with multihost_utils.live_devices(jax.devices()) as living:
        here = {device.process_index for device in living}
    if len(here) < jax.process_count():
        raise RuntimeError(f"{len(here)} of {jax.process_count()} are left.")


def _give_back() -> None:
    """Hands freed memory to the system; glibc keeps several hundred MiB otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Lists(NamedTuple):
    scores: np.ndarray
    indices: np.ndarray


class _Task(NamedTuple):
    matrix: np.ndarray
    rows: np.ndarray | None
    skip: np.ndarray | None
    k: int
    metric: str
    panel: int
    share: tuple[int, int]


def _steps(task: _Task, first: int) -> list[int]:
    """Which panels (of queries, where there are some) this share brings together with
    the panel from row `first`: where they begin."""
    band = first // task.panel
    if task.rows is None:  # the panel itself, then the earlier ones
        starts = [first, *range(0, first, task.panel)]
        before = band * (band + 1) // 2
    else:
        starts = [*range(0, len(task.rows), task.panel)]
        before = band * len(starts)
    number, count = task.share
    return [at for i, at in enumerate(starts, before) if i % count == number]


def _band(task: _Task, first: int, best: _Lists) -> Iterator[int]:
    """Everything of this share with the panel from row `first`.

    Changes `best` in place and yields how many scores each step has cost.
    """
    steps, devices = _steps(task, first), _devices()
    bring = _pair if task.rows is None else _query
    new = [_panel(task, first, device) for device in devices[: len(steps)]]
    groups = [
        steps[at : at + len(devices)] for at in range(0, len(steps), len(devices))
    ]
    for group, others in _visits(task, first, groups, devices):
        # An accelerator goes on by itself: all are at work before one is waited for.
        each = zip(group, others, new)
        found = [bring(task, first, at, a, b, best) for at, a, b in each]
        for at, merge in zip(group, found):
            merge()
            yield _cost(task, first, at)


def _visits(
    task: _Task, first: int, groups: Sequence[list[int]], devices: list[jax.Device]
) -> Iterator[tuple[list[int], list[jax.Array | None]]]:
    """The panels of each group, one on each device; the next ones are on their way."""

    def put(start: int, device: jax.Device) -> jax.Array | None:
        if task.rows is None:
            return None if start == first else _panel(task, start, device)
        ids = task.rows[start : start + task.panel]
        return jax.device_put(_absent_as_nan(task, task.matrix[ids], ids), device)

    panels = (list(map(put, group, devices)) for group in groups)
    coming = next(panels, None)
    for group in groups:
        present, coming = coming, next(panels, None)
        assert present is not None
        yield group, present


def _devices() -> list[jax.Device]:
    """What computes here: a processor's cores share one search."""
    devices = jax.local_devices()
    return devices[:1] if jax.default_backend() == "cpu" else devices


def _pair(task: _Task, first: int, start: int, old, new, best: _Lists) -> Callable:
    """The panels from rows `first` and `start`, both ways; returns what merges them."""
    k, metric = task.k, task.metric
    if start == first:
        own = kernels.all_pairs_neighbors(new, k=k, metric=metric)
        return functools.partial(_merge, task, best, first, own, first)
    # What a row has already spares it all that is worse.
    down, up = kernels.cross_neighbors(
        *(old, new),
        k=k,
        metric=metric,
        best_a=_known(task, best, start),
        best_b=_known(task, best, first),
    )

    def merge():
        _merge(task, best, start, down, first)
        _merge(task, best, first, up, start)

    return merge


def _query(task: _Task, first: int, start: int, queries, new, best: _Lists) -> Callable:
    """The queried rows from line `start` against the panel from row `first`."""
    assert task.rows is not None
    ids = task.rows[start : start + task.panel]
    found = kernels.nearest_neighbors(queries, new, k=task.k + 1, metric=task.metric)

    def merge():
        # The best k others are the best k + 1 without the row itself.
        itself = np.asarray(found.indices) + first == ids[:, None]
        others = np.argsort(itself, axis=1, kind="stable")[:, : task.k]
        kept = (np.take_along_axis(np.asarray(part), others, axis=1) for part in found)
        _merge(task, best, start, kernels.Neighbors(*map(jnp.asarray, kept)), first)

    return merge


def _known(task: _Task, best: _Lists, first: int) -> kernels.Neighbors:
    """The running neighbours of a panel's rows; none for those that fill it up."""
    scores = np.full((task.panel, task.k), np.nan, np.float32)
    indices = np.full((task.panel, task.k), -1, np.int32)
    here = best.scores[first : first + task.panel]
    scores[: len(here)] = here
    indices[: len(here)] = best.indices[first : first + task.panel]
    return kernels.Neighbors(jnp.asarray(scores), jnp.asarray(indices))


def _merge(
    task: _Task, best: _Lists, row: int, found: kernels.Neighbors, first_key: int
) -> None:
    """Merges what was `found` among the keys from `first_key` on into `best`, in place.

    Line 0 of `found` is line `row` of `best`; lines beyond its end are padding.
    """
    here = slice(row, row + len(found.indices))
    known = _Lists(*(part[here] for part in best))
    indices = np.asarray(found.indices)[: len(known.indices)]
    indices = np.where(indices >= 0, indices + first_key, -1).astype(np.int32)
    new = _Lists(np.asarray(found.scores)[: len(indices)], indices)
    if (known.indices >= 0).any():
        both = (kernels.Neighbors(*map(jnp.asarray, side)) for side in (known, new))
        merged = kernels.merge_neighbors(*both, metric=task.metric)
        new = _Lists(*map(np.asarray, merged))
    best.scores[here], best.indices[here] = new


def _panel(task: _Task, start: int, device: jax.Device) -> jax.Array:
    """The panel from row `start`, on a device.

    NaN rows, which are nobody's neighbours, fill up the last one: all panels have one
    shape, so that every kernel is compiled once.
    """
    rows = task.matrix[start : start + task.panel]
    block = np.full((task.panel, rows.shape[1]), np.nan, rows.dtype)
    block[: len(rows)] = rows
    ids = np.arange(start, start + task.panel)
    return jax.device_put(_absent_as_nan(task, block, ids), device)


def _absent_as_nan(task: _Task, block: np.ndarray, ids: np.ndarray) -> np.ndarray:
    if task.skip is None:
        return block
    absent = np.isin(ids, task.skip)[:, None]
    return np.where(absent, np.array(np.nan, block.dtype), block)


def _cost(task: _Task, first: int, start: int) -> int:
    """How many scores a step computes; rows that look for each other share one."""
    size = min(task.panel, len(task.matrix) - first)
    if task.rows is not None:
        return len(task.rows[start : start + task.panel]) * size
    return size * (size - 1) // 2 if start == first else task.panel * size


def _check_matrix(matrix: np.ndarray) -> None:
    if getattr(matrix, "ndim", 0) != 2 or not jnp.issubdtype(
        matrix.dtype, jnp.floating
    ):
        raise ValueError(
            "`matrix` must be [rows, features] of a floating dtype; got"
            f" {getattr(matrix, 'shape', type(matrix))},"
            f" {getattr(matrix, 'dtype', 'no dtype')}."
        )


def _ids(name: str, ids: np.ndarray | None, n: int) -> np.ndarray | None:
    if ids is None:
        return None
    ids = np.asarray(ids, np.int64)
    if ids.ndim != 1 or np.any(np.diff(ids, prepend=-1, append=n) <= 0):
        raise ValueError(
            f"`{name}` must be different row numbers in [0, {n}), ascending."
        )
    return ids


def _digest(ids: np.ndarray | None) -> str | None:
    return None if ids is None else hashlib.sha256(ids.tobytes()).hexdigest()


def _save(path: pathlib.Path, inputs: dict, bands: int, best: _Lists) -> None:
    """Replaces the state's file: its checksum, its description, scores, indices."""
    header = json.dumps({"inputs": inputs, "bands": bands}, sort_keys=True).encode()
    parts: list[Any] = [header + b"\n", best.scores.data, best.indices.data]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(digest.hexdigest().encode() + b"\n")
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(
            f"Cannot save the sweep in {path}: {error.strerror or error}. What was"
            " saved before is still there; the same command goes on from it."
        ) from error


def _load(
    path: pathlib.Path, inputs: dict, shape: tuple[int, int]
) -> tuple[int, _Lists] | None:
    """The number of finished bands and their result; None where nothing can be used."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    checksum, _, rest = content.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != checksum:
        warnings.warn(
            f"{path} is damaged (its checksum is wrong); the sweep begins again.",
            stacklevel=3,
        )
        return None
    header, _, arrays = rest.partition(b"\n")
    record = json.loads(header)
    if record["inputs"] != inputs:
        before = record["inputs"]
        differences = ", ".join(
            f"{name} was {before.get(name)!r} and is now {inputs[name]!r}"
            for name in inputs
            if before.get(name) != inputs[name]
        )
        raise ValueError(
            f"{path} holds the state of another sweep: {differences}. Choose another"
            " place, or remove that file."
        )
    half = len(arrays) // 2
    scores = np.frombuffer(arrays[:half], np.float32).reshape(shape).copy()
    indices = np.frombuffer(arrays[half:], np.int32).reshape(shape).copy()
    return record["bands"], _Lists(scores, indices)
