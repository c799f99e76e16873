"""How a model knows where a token stands: rotations, sinusoids, slopes and buckets."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class Rope(NamedTuple):
    """One kind of rotary embedding. Su et al., 2021, https://arxiv.org/abs/2104.09864.

    `fraction` of each head is rotated, by angles of base `theta`. `kind` says how the
    frequencies were stretched after training: "default", "linear", "dynamic" (which is
    the default one within the configured length), "llama3" or "yarn".
    """

    theta: float = 10000.0
    fraction: float = 1.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


_KNOWN = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor",
    "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "truncate",
}  # fmt: skip


def read_rope(
    parameters: dict[str, Any], *, theta: float, fraction: float, length: int
) -> Rope:
    """The `Rope` of a config's rope_parameters or, older, of its rope_scaling.

    `theta`, `fraction` and `length` (the configured number of positions) are used
    where `parameters` does not name them.

    Raises:
      ValueError: a kind or a parameter that is not handled.
    """
    if not isinstance(parameters, dict):
        raise ValueError(f"rope parameters {parameters!r:.80} are not named values")
    unknown = sorted(set(parameters) - _KNOWN)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = "default" if kind == "dynamic" else kind
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"rope type {kind!r} is not handled")
    if parameters.get("truncate", True) is not True:
        unknown.append("truncate")
    if unknown:
        raise ValueError(f"rope parameters {unknown} are not handled")
    rope = Rope(
        theta=float(parameters.get("rope_theta", theta)),
        fraction=float(parameters.get("partial_rotary_factor", fraction)),
    )
    if not (0 < rope.theta < math.inf and 0 < rope.fraction <= 1):
        raise ValueError(
            f"rope_theta {rope.theta} or partial_rotary_factor {rope.fraction} is out"
            " of range"
        )
    if kind == "default":
        return rope
    factor = float(parameters["factor"])
    if not 0 < factor < math.inf:
        raise ValueError(f"rope factor {factor} is out of range")
    rope = rope._replace(kind=kind, factor=factor)
    original = parameters.get("original_max_position_embeddings") or length
    if kind == "llama3":
        return rope._replace(
            low_frequency=float(parameters["low_freq_factor"]),
            high_frequency=float(parameters["high_freq_factor"]),
            original_length=int(original),
        )
    if kind == "yarn":
        attention = parameters.get("attention_factor")
        if attention is None:
            scale, all_dims = (
                0.1 * (parameters.get(name) or 1.0) * math.log(factor) + 1.0
                if factor > 1
                else 1.0
                for name in ("mscale", "mscale_all_dim")
            )
            both = parameters.get("mscale") and parameters.get("mscale_all_dim")
            attention = scale / all_dims if both else 0.1 * math.log(factor) + 1.0
            attention = attention if factor > 1 else 1.0
        return rope._replace(
            beta_fast=float(parameters.get("beta_fast") or 32),
            beta_slow=float(parameters.get("beta_slow") or 1),
            attention_factor=float(attention),
            original_length=int(original),
        )
    return rope


def rope_frequencies(rope: Rope, head_size: int) -> np.ndarray:
    """Radians per position of each rotated pair, float32 `[head_size * fraction / 2]`.

    The stretched kinds are those of the papers: linear position interpolation
    (https://arxiv.org/abs/2306.15595), Llama 3.1 (https://arxiv.org/abs/2407.21783),
    YaRN (https://arxiv.org/abs/2309.00071).

    Raises:
      ValueError: what is rotated is no number of pairs.
    """
    rotated = int(head_size * rope.fraction)
    if rotated % 2 or not rotated:
        raise ValueError(f"of heads of size {head_size}, {rotated} cannot be rotated")
    pair = np.arange(0, rotated, 2, dtype=np.float64)
    frequency = rope.theta ** (-pair / rotated)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        # Turns made within the original length: few turns are interpolated, many kept.
        turns = rope.original_length * frequency / (2 * np.pi)
        kept = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
        kept = np.clip(kept, 0, 1)
        frequency = frequency * (kept + (1 - kept) / rope.factor)
    elif rope.kind == "yarn":

        def pair_that_makes(turns: float) -> float:
            length = rope.original_length / (turns * 2 * np.pi)
            return rotated * np.log(length) / (2 * np.log(rope.theta))

        low = max(np.floor(pair_that_makes(rope.beta_fast)), 0)
        high = min(np.ceil(pair_that_makes(rope.beta_slow)), rotated - 1)
        ramp = (pair / 2 - low) / max(high - low, 0.001)
        kept = 1 - np.clip(ramp, 0, 1)
        frequency = frequency * (kept + (1 - kept) / rope.factor)
    return frequency.astype(np.float32)


def rope_tables(
    ropes: tuple[Rope, ...], head_size: int, positions: Array
) -> tuple[Array, Array]:
    """Cosines and sines, float32 `[rope, batch, position, 1, rotated / 2]`."""
    frequencies = np.stack([rope_frequencies(rope, head_size) for rope in ropes])
    scale = np.array([rope.attention_factor for rope in ropes], np.float32)
    angles = positions[None, :, :, None, None].astype(jnp.float32)
    angles = angles * frequencies[:, None, None, None, :]
    scale = scale[:, None, None, None, None]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotates the pairs (i, i + rotated / 2) of `x` `[batch, position, head, size]`."""
    half = cosine.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    cosine, sine = cosine.astype(x.dtype), sine.astype(x.dtype)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate([*turned, rest], axis=-1)


def sinusoids(positions: Array, width: int) -> Array:
    """Sines then cosines of geometric frequencies, float32 `[..., width]`.

    Vaswani et al., 2017, https://arxiv.org/abs/1706.03762, in the order of fairseq.
    """
    half = width // 2
    frequency = np.exp(np.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(waves, [(0, 0)] * positions.ndim + [(0, width % 2)])


def alibi_slopes(heads: int) -> np.ndarray:
    """The penalty of each head per step of distance, float32 `[heads]`.

    Press et al., 2022, https://arxiv.org/abs/2108.12409: powers of 2^(-8/n) for n
    heads; where n is no power of two, every second slope of twice as many follows.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return np.array(slopes, np.float32)


def relative_buckets(
    distance: Array, buckets: int, max_distance: int, *, causal: bool
) -> Array:
    """The bucket of `distance` = key position - query position.

    Raffel et al., 2020, https://arxiv.org/abs/1910.10683: exact for small distances,
    then logarithmic up to `max_distance`; half the buckets look ahead unless `causal`.
    """
    if causal:
        offset, distance = jnp.zeros_like(distance), -jnp.minimum(distance, 0)
    else:
        buckets = buckets // 2
        offset, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    exact = buckets // 2
    ratio = jnp.maximum(distance, 1).astype(jnp.float32) / exact
    far = exact + (
        jnp.log(ratio) / math.log(max_distance / exact) * (buckets - exact)
    ).astype(jnp.int32)
    far = jnp.minimum(far, buckets - 1)
    return offset + jnp.where(distance < exact, distance, far)


def positions_of(mask: Array, segments: Array | None = None) -> Array:
    """Place of each real token among the real ones (of its document), int32."""
    mask = mask.astype(jnp.int32)
    count = jnp.cumsum(mask, axis=1) - 1
    if segments is not None:
        new = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)])
        # Where padding stands first, the document begins one token later.
        begin = jnp.where(new, count + 1 - mask, 0)
        count = count - lax.cummax(begin, axis=1)
    return jnp.maximum(count, 0)
