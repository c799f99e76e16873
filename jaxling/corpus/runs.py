"""Counts of whole corpora: over the processes of one machine, or on a Dask cluster.

Both call `count_shard` and `merge` and nothing else. On one machine each finished shard
is a file; a run that was killed goes on with the shards that have none. Neighbouring
files are merged on the way, so that few are left, however many shards there are.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import threading
import time
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
import tqdm

from .cooccurrence import Counts, Pairs, Plan, count_shard, merge
from .readers import Damage, Shard

_FOLD = 16  # neighbouring files that become one


class Corpus(NamedTuple):
    """Finished counts, and what it took: how many shards were there already."""

    counts: Counts
    shards: int
    resumed: int


def count_corpus(
    shards: Sequence[Shard],
    plan: Plan,
    *,
    workdir: str | os.PathLike | None = None,
    processes: int | None = None,
    strict: bool = False,
    progress: bool = True,
) -> Corpus:
    """Counts all shards on this machine.

    Args:
      shards: from `find_shards`.
      plan: what to count.
      workdir: where finished shards are kept, and read from if the run is repeated;
        None keeps nothing.
      processes: how many work at a time; as many as there are processors when None.
        More than one import a calling script again, which must call this under
        `if __name__ == "__main__":` only.
      strict: the first damage stops the run.
      progress: shows shards on standard error.

    Raises:
      ValueError: there is no shard; an argument breaks its rule; `workdir` holds
        another count; damage, where it is `strict`.
      OSError: a file cannot be read or written, or a process was killed. What was
        finished is kept.
    """
    if not shards:
        raise ValueError("There is no shard to count.")
    processes = processes or _processors()
    folder = None
    finished: dict[tuple[int, int], Counts | None] = {}
    if workdir is not None:
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, shards, plan)
        finished = dict.fromkeys(_found(folder))
    done = {i for begin, end in finished for i in range(begin, end)}
    waiting = [i for i in range(len(shards)) if i not in done]
    with tqdm.tqdm(
        total=len(shards),
        initial=len(done),
        desc="counting",
        unit=" shards",
        disable=not progress,
    ) as bar:
        for number, counts in _counted(
            shards, waiting, plan, folder, processes, strict
        ):
            finished[number, number + 1] = counts
            _fold(finished, folder, number, len(shards))
            bar.update()
    total = None
    for piece in sorted(finished):
        counts = finished.pop(piece) or load_counts(_name(folder, piece))
        total = counts if total is None else merge(total, counts)
    assert total is not None
    if strict and (total.damage.skipped or total.damage.mended):
        # Of shards that an earlier run, which was not strict, had finished.
        raise ValueError(total.damage.examples[0])
    return Corpus(total, len(shards), len(done))


def _processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _counted(
    shards: Sequence[Shard],
    waiting: Sequence[int],
    plan: Plan,
    folder: pathlib.Path | None,
    processes: int,
    strict: bool,
) -> Iterable[tuple[int, Counts | None]]:
    """Numbers of shards as they are finished; their counts where there is no folder."""
    jobs = [(i, shards[i], plan, folder, strict) for i in waiting]
    if min(processes, len(jobs)) < 2:
        yield from map(_count_one, jobs)
        return
    # A fork of a process with threads (jax has some) may hang: spawn.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(jobs)),
        multiprocessing.get_context("spawn"),
        _begin_worker,
        (os.getpid(),),
    )
    try:
        # No list of them is kept here, for it would keep all their results.
        for future in concurrent.futures.as_completed(
            [pool.submit(_count_one, job) for job in jobs]
        ):
            yield future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "A process that counted ended. Was it killed, for want of memory? Then the"
            " same call goes on from what is finished in its `workdir`. Or is the call"
            " at the top of a script? Processes import the script again, so it must"
            " stand under `if __name__ == '__main__':`."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(parent: int) -> None:
    """Lets a worker end with its parent, even if that was killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one processor for each worker

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _count_one(job: tuple) -> tuple[int, Counts | None]:
    number, shard, plan, folder, strict = job
    counts = count_shard(shard, plan, strict=strict)
    if folder is None:
        return number, counts
    save_counts(counts, _name(folder, (number, number + 1)))
    return number, None


def _fold(
    finished: dict[tuple[int, int], Counts | None],
    folder: pathlib.Path | None,
    number: int,
    last: int,
) -> None:
    """Merges a shard with its neighbours once all of a group are there.

    Groups are the same whatever the order in which shards are finished.
    """
    size = 1
    while size < last:
        begin = number // (size * _FOLD) * (size * _FOLD)
        ends = [min(at, last) for at in range(begin, begin + size * _FOLD + 1, size)]
        pieces = [piece for piece in zip(ends, ends[1:]) if piece[0] < piece[1]]
        if len(pieces) < 2 or not all(piece in finished for piece in pieces):
            return
        total = finished[pieces[0]] or load_counts(_name(folder, pieces[0]))
        for piece in pieces[1:]:
            total = merge(total, finished[piece] or load_counts(_name(folder, piece)))
        whole = (pieces[0][0], pieces[-1][1])
        if folder is not None:
            save_counts(total, _name(folder, whole))
            for piece in pieces:
                _name(folder, piece).unlink()
        for piece in pieces:
            del finished[piece]
        finished[whole] = total if folder is None else None
        size *= _FOLD


def _name(folder: pathlib.Path | None, piece: tuple[int, int]) -> pathlib.Path:
    assert folder is not None
    return folder / f"shards-{piece[0]}-{piece[1]}.npz"


def _found(folder: pathlib.Path) -> list[tuple[int, int]]:
    """Which runs of shards are finished; files that are damaged or merged go away."""
    pieces = []
    for path in folder.glob("shards-*.npz"):
        numbers = re.fullmatch(r"shards-(\d+)-(\d+)\.npz", path.name)
        try:
            load_counts(path)
        except ValueError as error:
            warnings.warn(f"{error} It is counted again.", stacklevel=3)
            path.unlink()
        else:
            if numbers:
                pieces.append((int(numbers[1]), int(numbers[2])))
    kept: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda piece: piece[0] - piece[1]):
        if any(a <= piece[0] and piece[1] <= b for a, b in kept):
            _name(folder, piece).unlink()  # killed between merging and tidying up
        else:
            kept.append(piece)
    return kept


def _claim(folder: pathlib.Path, shards: Sequence[Shard], plan: Plan) -> None:
    """Writes what is counted here.

    Raises:
      ValueError: something else is.
    """
    tokenizer = None if plan.tokenizer is None else plan.tokenizer.to_str()
    record = {
        "plan": _digest(plan._replace(tokenizer=tokenizer)),
        "shards": fingerprint(shards),
    }
    path = folder / "count.json"
    if path.exists():
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError:
            before = {}
        differ = [name for name in record if before.get(name) != record[name]]
        if before and differ:
            raise ValueError(
                f"{folder} holds a count of other {' and '.join(differ)} (or a file"
                " was changed since). Choose another place, or remove that one."
            )
    partial = path.with_name("count.json.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    os.replace(partial, path)


def fingerprint(shards: Sequence[Shard]) -> str:
    """Of what is read, and how; it changes with the files, where they are local.

    Raises:
      OSError: a file is not there.
    """
    return _digest([(*shard, *_stamp(shard.url)) for shard in shards])


def _digest(content: Any) -> str:
    return hashlib.sha256(repr(content).encode(errors="surrogatepass")).hexdigest()


def _stamp(url: str) -> tuple:
    """What changes with a local file."""
    if "://" in url:
        return ()
    found = os.stat(url)
    return found.st_size, found.st_mtime_ns


def count_on_dask(
    shards: Sequence[Shard], plan: Plan, client: Any, *, strict: bool = False
) -> Counts:
    """Counts all shards on a Dask cluster (extra `dask`).

    Shards of a worker that dies are counted by others, as often as the cluster's
    configuration allows. URLs must mean the same on all workers.

    Args:
      shards: from `find_shards`.
      plan: what to count.
      client: a `distributed.Client`.
      strict: the first damage stops the run.

    Raises:
      ValueError: there is no shard; as `count_shard`.
      OSError: as `count_shard`; too many workers died of a shard, or the cluster ended.
    """
    # Imported here: an extra, but whoever has a client has it.
    from distributed.scheduler import KilledWorker

    if not shards:
        raise ValueError("There is no shard to count.")
    # The result of a task, not scattered data: it can be had again if it is lost.
    sent = client.submit(_itself, plan, pure=False)
    parts = client.map(count_shard, shards, plan=sent, strict=strict, pure=False)
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2])
        rest = parts[len(parts) // 2 * 2 :]
        parts = [client.submit(merge, a, b, pure=False) for a, b in pairs] + rest
    try:
        return parts[0].result()
    except (KilledWorker, concurrent.futures.CancelledError) as error:
        raise ChildProcessError(
            f"The Dask cluster gave up: {error} Were workers killed, for want of"
            " memory?"
        ) from None


def _itself(plan: Plan) -> Plan:
    return plan


def save_counts(counts: Counts, path: str | os.PathLike) -> None:
    """Writes counts as `.npz`; the file is the old one or complete.

    Raises:
      OSError: the file cannot be written.
    """
    arrays: dict[str, Any] = {}
    for name, value in counts._asdict().items():
        if isinstance(value, Pairs):
            parts = value._asdict().items()
            arrays |= {f"{name}.{part}": array for part, array in parts}
        elif isinstance(value, Damage):
            arrays[name] = np.array(json.dumps(value))
        elif value is not None:
            arrays[name] = np.asarray(value)
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_counts(path: str | os.PathLike) -> Counts:
    """Reads counts that `save_counts` wrote.

    Raises:
      ValueError: the file is damaged, or of another kind.
      OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        skipped, mended, empty, examples = json.loads(str(arrays.pop("damage")))
        values: dict[str, Any] = dict.fromkeys(Counts._fields)
        for name, array in arrays.items():
            if "." not in name:
                values[name] = array if array.ndim else int(array)
        for name in {name.split(".")[0] for name in arrays if "." in name}:
            parts = (arrays[f"{name}.{part}"] for part in Pairs._fields)
            values[name] = Pairs(*parts)
        values["damage"] = Damage(skipped, mended, empty, tuple(examples))
        return Counts(**values)
    # RuntimeError: zipfile takes flipped bits for encryption and the like.
    except (
        *(ValueError, KeyError, TypeError, EOFError),
        *(RuntimeError, zipfile.BadZipFile),
    ) as error:
        raise ValueError(
            f"{path} is no file of counts, or damaged: {error!r}."
        ) from None
