"""How fast are five quantities of every layer beside a loop over full logits?

    python -m experiments.benchmarks.lens --dtype=bfloat16

12 layers x 256 positions, 768 wide, 250,002 tokens (`--vocabulary`): the top ten,
rank and log-probability of a target, entropy, and KL from the last layer. Dense float32
logits of all layers would take 3.1 GB. The loops make one layer's logits after the
other, the last layer's first, in torch and in jitted jnp, from the same weights; in
torch the product of bfloat16 weights is bfloat16, as it is with `lm_head`. The product
line computes all logits and keeps nothing but maxima: no lens can be faster. Memory is
the peak rise of a second call in a fresh process, compilation apart. Needs the `torch`
extra.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxling import kernels

from . import harness

LAYERS, POSITIONS, WIDTH, TOP = 12, 256, 768, 10
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 250_002, "Tokens.", TOP)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Interleaved repetitions.", 1)
_MEMORY = flags.DEFINE_bool("memory", True, "Also the peak memory of ours.")


def arrays(vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stream `[layer, position, d]`, unembedding, and a target for each position."""
    rng = np.random.default_rng(0)
    unembed = rng.standard_normal((vocabulary, WIDTH), np.float32) * 0.05
    stream = rng.standard_normal((LAYERS, POSITIONS, WIDTH), np.float32)
    return stream, unembed, rng.integers(0, vocabulary, POSITIONS)


def in_jax(kind: str, vocabulary: int) -> tuple[jax.Array, ...]:
    stream, unembed, targets = arrays(vocabulary)
    return jnp.asarray(stream, kind), jnp.asarray(unembed, kind), jnp.asarray(targets)


def ours(stream, unembed, targets) -> Callable:
    options = dict(k=TOP, entropy=True, divergence=True, targets=targets)
    return lambda: jax.block_until_ready(
        kernels.project_layers(stream, unembed, **options)
    )


def ours_alone(kind: str, vocabulary: int) -> Callable:
    """Ours for a process of its own."""
    return ours(*in_jax(kind, vocabulary))


@jax.jit
def _maxima(keys, rows):
    logits = jnp.einsum(
        "vd,rd->vr",
        keys,
        rows,
        preferred_element_type=jnp.float32,
        precision="highest" if keys.dtype == jnp.float32 else None,
    )
    return logits.max(0)


def product(stream, unembed) -> Callable:
    rows = stream.reshape(-1, WIDTH)

    def multiply():
        for start in range(0, len(unembed), 4096):
            jax.block_until_ready(_maxima(unembed[start : start + 4096], rows))

    return multiply


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


def jnp_loop(stream, unembed, targets) -> Callable:
    def loop():
        final, last = _dense_layer(stream[-1], unembed, targets, None)
        found = []
        for rows in stream[:-1]:
            found.append(_dense_layer(rows, unembed, targets, final)[1])
            jax.block_until_ready(found[-1])  # one layer's logits at a time
        return jax.block_until_ready([*found, last])

    return loop


def torch_loop(kind: str, vocabulary: int) -> Callable:
    import torch

    stream, unembed, targets = map(torch.tensor, arrays(vocabulary))
    stream, unembed = (x.to(getattr(torch, kind)) for x in (stream, unembed))

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

    def loop():
        with torch.inference_mode():
            final, last = layer(stream[-1], None)
            return [*(layer(rows, final)[1] for rows in stream[:-1]), last]

    return loop


def main(argv: list[str]) -> None:
    del argv
    kind, vocabulary = _DTYPE.value, _VOCABULARY.value
    stream, unembed, targets = in_jax(kind, vocabulary)
    contestants = {
        "ours": ours(stream, unembed, targets),
        "torch": torch_loop(kind, vocabulary),
        "jnp": jnp_loop(stream, unembed, targets),
        "product": product(stream, unembed),
    }
    timings, _ = harness.interleaved(contestants, _ROUNDS.value)
    found = {
        f"{name} / ours": round(timing.median / timings["ours"].median, 2)
        for name, timing in timings.items()
        if name != "ours"
    }
    if _MEMORY.value:
        _, rise = harness.peak_rises(ours_alone, kind, vocabulary)
        dense = LAYERS * POSITIONS * vocabulary * 4 / 2**20
        found["extra memory of ours, MiB"] = round(rise, 1)
        found["dense logits / extra memory"] = round(dense / rise, 1)
    case = {
        "layers": LAYERS,
        "positions": POSITIONS,
        "columns": WIDTH,
        "tokens": vocabulary,
        "dtype": kind,
    }
    harness.record("lens", case, timings, found)


if __name__ == "__main__":
    app.run(main)
