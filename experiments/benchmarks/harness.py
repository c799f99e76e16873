"""Timing of alternatives side by side: interleaved, in one run, with a record.

Repetitions go A B C A B C ..., so that a change of the machine's mood meets all alike.
A contestant that cannot share a process with the others (two OpenMP runtimes) runs in
a sibling. Every result is one line of `results.jsonl`.
"""

import atexit
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

RESULTS = pathlib.Path(__file__).with_name("results.jsonl")


class Timing(NamedTuple):
    """Seconds of each repetition, and of the first call, which is apart.

    A sibling prepares by itself: it has no first call.
    """

    first: float | None
    seconds: list[float]

    @property
    def median(self) -> float:
        """Of the repetitions."""
        return statistics.median(self.seconds)


def interleaved(
    contestants: dict[str, Callable[[], Any]],
    repeats: int,
    left_out: dict[str, str] | None = None,
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Timings of all contestants, and what each returned last.

    Whoever shares this process is called once before (compilation); a call must
    return finished results. With `left_out`, one whose first call raises is entered
    there with the reason, and the others go on.
    """
    first: dict[str, float | None] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, Any] = {}
    for name, call in contestants.items():
        try:
            first[name] = None if isinstance(call, Sibling) else _timed(call)[0]
        except Exception as error:
            if left_out is None:
                raise
            left_out[name] = reason(error)
    for _ in range(repeats):
        for name in first:
            took, results[name] = _timed(contestants[name])
            seconds[name].append(took)
    return {name: Timing(first[name], seconds[name]) for name in first}, results


def reason(error: Exception) -> str:
    """Kind and first line of an error, for a record."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


class Sibling:
    """A process of its own that prepares once and then answers calls."""

    def __init__(self, prepare: Callable[..., Callable[[], Any]], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        # No daemon: joblib lets those use one processor only.
        self.process = context.Process(target=_serve, args=(theirs, prepare, args))
        self.process.start()
        theirs.close()
        # The end of the pipe ends the sibling, also where an error ends this process.
        atexit.register(self.ours.close)
        self.ours.recv()

    def __call__(self) -> Any:
        self.ours.send(True)
        return self.ours.recv()

    def close(self) -> None:
        """Ends the process."""
        self.ours.send(False)
        self.process.join()


def _serve(pipe: Any, prepare: Callable[..., Callable[[], Any]], args: tuple) -> None:
    call = prepare(*args)
    pipe.send(True)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            pipe.send(call())


def peak_rises(
    prepare: Callable[..., Callable[[], Any]], *args: Any
) -> tuple[float, float]:
    """Peak memory in MiB that a first and a later call add, in a process of their own.

    The first call compiles, and what compilers keep counts for it.
    """
    sibling = Sibling(_watched, prepare, *args)
    rises = sibling(), sibling()
    sibling.close()
    return rises


def _watched(prepare: Callable[..., Callable[[], Any]], *args: Any):
    call = prepare(*args)

    def rise() -> float:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        # Writing 5 resets the peak that the kernel keeps of this process.
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before

    return rise


def _status(field: str) -> float:
    text = pathlib.Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}.")
    return int(found.group(1)) / 1024


def record(
    benchmark: str,
    case: dict[str, Any],
    timings: dict[str, Timing],
    found: dict[str, Any],
) -> None:
    """Appends a line to `results.jsonl` and shows a table."""
    line = {
        "benchmark": benchmark,
        "case": case,
        "seconds": {
            name: {
                "median": round(timing.median, 4),
                "least": round(min(timing.seconds), 4),
                "most": round(max(timing.seconds), 4),
                "first": timing.first and round(timing.first, 4),
                "repeats": len(timing.seconds),
            }
            for name, timing in timings.items()
        },
        "found": found,
        "device": device(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "numpy", "faiss-cpu", "scikit-learn", "torch")
            if _installed(name)
        }
        | {"python": platform.python_version()},
        "command": "python -m experiments.benchmarks." + benchmark + _arguments(),
        "date": datetime.date.today().isoformat(),
    }
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{benchmark} {case}")
    for name, timing in timings.items():
        spread = f"{min(timing.seconds):.2f}-{max(timing.seconds):.2f}"
        print(f"  {name:24s} {timing.median:8.3f} s  ({spread})")
    for name, value in found.items():
        print(f"  {name}: {value}")


def device() -> str:
    """What computes: the accelerator, or the processor and how many of it."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {kind}"
    info = pathlib.Path("/proc/cpuinfo")
    model = (
        re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    )
    flags = info.read_text() if info.exists() else ""
    suffix = " (avx512_bf16)" if "avx512_bf16" in flags else ""
    return (
        f"{os.cpu_count()} x {model.group(1) if model else platform.machine()}{suffix}"
    )


def _arguments() -> str:
    return "".join(f" {argument}" for argument in sys.argv[1:])


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
