"""How fast are five quantities of every layer beside a loop over full logits?

    python -m experiments.benchmarks.lens --dtype=bfloat16

12 layers x 256 positions, 768 wide, 250,002 tokens (`--vocabulary`): the top ten,
rank and log-probability of a target, entropy, and KL from the last layer. Dense float32
logits of all layers would take 3.1 GB. The loops make one layer's logits after the
other, the last layer's first, in torch and in jitted jnp, from the same weights; in
torch the product of bfloat16 weights is bfloat16, as it is with `lm_head`. Runs take
turns in one process on the same threads. Needs the `torch` extra. The record is written
to `experiments/benchmarks/lens_<dtype>.json`.
"""

import ctypes
import functools
import gc
import json
import pathlib
import platform
import statistics
import threading
import time
from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxling import kernels

DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights.")
VOCABULARY = flags.DEFINE_integer("vocabulary", 250_002, "Tokens.", 1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of which the median is taken.", 1)
LAYERS, POSITIONS, WIDTH, TOP = 12, 256, 768, 10


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and by how many bytes the process grew, looked at every 5 ms.

    What was freed before is first given back, or it would be used again unseen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)

    def resident() -> int:
        fields = pathlib.Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * 4096

    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    taken = seconds(call)
    done.set()
    watcher.join()
    return taken, max(most - before, 0)


def ours(hidden, unembed, targets):
    return jax.block_until_ready(
        kernels.project_layers(
            hidden, unembed, k=TOP, entropy=True, divergence=True, targets=targets
        )
    )


@jax.jit
def _dense_layer(rows, unembed, targets, final):
    logits = jnp.matmul(rows, unembed.T, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    final = log_p if final is None else final
    own = jnp.take_along_axis(logits, targets[:, None], -1)
    return log_p, (
        jax.lax.top_k(log_p, TOP),
        jnp.sum(logits > own, -1),
        -jnp.sum(p * log_p, -1),
        jnp.sum(jnp.exp(final) * (final - log_p), -1),
        jnp.take_along_axis(log_p, targets[:, None], -1),
    )


def jnp_loop(hidden, unembed, targets):
    final, last = _dense_layer(hidden[-1], unembed, targets, None)
    found = []
    for rows in hidden[:-1]:
        found.append(_dense_layer(rows, unembed, targets, final)[1])
        jax.block_until_ready(found[-1])  # one layer's logits at a time
    return jax.block_until_ready([*found, last])


def torch_loop(hidden, unembed, targets):
    import torch

    def layer(rows, final):
        logits = (rows @ unembed.T).float()
        log_p = torch.log_softmax(logits, -1)
        p = log_p.exp()
        final = log_p if final is None else final
        own = logits.gather(-1, targets[:, None])
        return log_p, (
            log_p.topk(TOP),
            (logits > own).sum(-1),
            -(p * log_p).sum(-1),
            (final.exp() * (final - log_p)).sum(-1),
            log_p.gather(-1, targets[:, None]),
        )

    with torch.inference_mode():
        final, last = layer(hidden[-1], None)
        return [*(layer(rows, final)[1] for rows in hidden[:-1]), last]


def main(argv: list[str]) -> None:
    del argv
    import torch

    rng = np.random.default_rng(0)
    vocabulary = VOCABULARY.value
    matrix = rng.standard_normal((vocabulary, WIDTH), np.float32) * 0.05
    stream = rng.standard_normal((LAYERS, POSITIONS, WIDTH), np.float32)
    targets = rng.integers(0, vocabulary, POSITIONS)
    kind = DTYPE.value
    jax_inputs = (
        jnp.asarray(stream, kind),
        jnp.asarray(matrix, kind),
        jnp.asarray(targets),
    )
    torch_inputs = (
        torch.tensor(stream).to(getattr(torch, kind)),
        torch.tensor(matrix).to(getattr(torch, kind)),
        torch.tensor(targets),
    )
    del matrix
    calls = {
        "jaxling": functools.partial(ours, *jax_inputs),
        "torch": functools.partial(torch_loop, *torch_inputs),
        "jnp": functools.partial(jnp_loop, *jax_inputs),
    }
    first = {name: seconds(calls[name]) for name in ("jaxling", "jnp")}  # compilation
    times = {name: [] for name in calls}
    extra = dict.fromkeys(calls, 0)
    for _ in range(ROUNDS.value):
        for name, call in calls.items():
            taken, grown = measured(call)
            times[name].append(taken)
            extra[name] = max(extra[name], grown)
    medians = {name: statistics.median(values) for name, values in times.items()}
    dense = LAYERS * POSITIONS * vocabulary * 4
    record = {
        "shape": [LAYERS, POSITIONS, WIDTH, vocabulary],
        "dtype": kind,
        "seconds": {k: [round(t, 3) for t in v] for k, v in times.items()},
        "median": {k: round(v, 3) for k, v in medians.items()},
        "first_call": {k: round(v, 3) for k, v in first.items()},
        "times_as_fast": {
            k: round(medians[k] / medians["jaxling"], 2) for k in ("torch", "jnp")
        },
        "peak_extra_mb": {k: round(v / 1e6, 1) for k, v in extra.items()},
        "dense_over_extra": round(dense / max(extra["jaxling"], 1), 1),
        "threads": torch.get_num_threads(),
        "devices": [str(device) for device in jax.devices()],
        "processor": platform.processor() or platform.machine(),
        "versions": {name: metadata.version(name) for name in ("jax", "torch")},
    }
    path = pathlib.Path(__file__).with_name(f"lens_{kind}.json")
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    app.run(main)
