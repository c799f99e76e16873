"""Rules: which parameter a tensor of a checkpoint fills, and how.

A rule table maps templates of tensor names to rules. In a template `{layer}` is the
number of a block, `{any}` is anything, and a part in parentheses may be absent; nothing
else is special, and the whole name must fit. A rule names the parameters that the
tensor fills, by their path in the model, and how; or why it is not needed.

Conversions are views: indexing, reshaping and transposing a mapped tensor reads
nothing.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Rule(NamedTuple):
    """How a tensor fills the parameters at `paths`, one layer of each.

    `view(tensor, part, shape)` is the part for `paths[part]` in that parameter's
    `shape`, without a copy; it raises ValueError where the tensor does not fit.
    `join(parts)` makes the tensor again.
    """

    paths: tuple[str, ...]
    view: Callable[[np.ndarray, int, tuple[int, ...]], np.ndarray]
    join: Callable[[list[np.ndarray]], np.ndarray]


class Ignore(NamedTuple):
    """A tensor that is known and not needed."""

    reason: str


class Alias(NamedTuple):
    """Another name of the tensor with the rule `of`, for files that lack that one.

    A `copy` that stands beside it must hold the same values.
    """

    of: str
    copy: bool = True


Rules = Mapping[str, Rule | Ignore | Alias]
Table = dict[str, Rule | Ignore | Alias]  # one that is being written


# Of any family: what other tasks put behind the last hidden state.
OTHER_HEADS: Rules = {
    name: Ignore("a head for another task")
    for name in (
        "score.{any}",
        "classifier.{any}",
        "classification_head.{any}",
        "multiple_choice_head.{any}",
        "qa_outputs.{any}",
    )
}


def same(path: str) -> Rule:
    """The tensor as it is."""
    return Rule(
        (path,),
        lambda tensor, part, shape: reshaped(tensor, shape, shape),
        lambda parts: parts[0],
    )


def vector(path: str) -> Rule:
    """A bias or scale, whose heads and sizes are one axis in the file."""
    return Rule(
        (path,),
        lambda tensor, part, shape: reshaped(tensor, (math.prod(shape),), shape),
        lambda parts: parts[0].reshape(-1),
    )


def linear(path: str) -> Rule:
    """A kernel that torch stores as `[out, in]`; the outs may be heads and sizes."""
    return Rule(
        (path,),
        lambda tensor, part, shape: _transpose(tensor, shape, 1),
        lambda parts: parts[0].reshape(len(parts[0]), -1).T,
    )


def linear_of_heads(path: str) -> Rule:
    """As `linear`, of a kernel `[head, size, out]`."""
    return Rule(
        (path,),
        lambda tensor, part, shape: _transpose(tensor, shape, 2),
        lambda parts: parts[0].reshape(-1, parts[0].shape[-1]).T,
    )


def dense(name: str, path: str, kernel: Callable[[str], Rule] = linear) -> Table:
    """The rules of a kernel and its bias."""
    return {
        f"{name}.weight": kernel(f"{path}.kernel"),
        f"{name}.bias": vector(f"{path}.bias"),
    }


def norm(name: str, path: str) -> Table:
    """The rules of a layer norm."""
    return {
        f"{name}.weight": same(f"{path}.scale"),
        f"{name}.bias": same(f"{path}.bias"),
    }


def unembedding(name: str, tied: bool) -> Table:
    """The rule of the unembedding, of which files may hold a copy where it is tied."""
    rule = Ignore("tied: it is the embedding") if tied else same("unembedding")
    return {name: rule}


def heads_of_three(path: str) -> Rule:
    """Query, key and value as one kernel, `[head, (q, k, v), size]` by `d` in torch."""
    return Rule(
        _three(path, "kernel"),
        lambda tensor, part, shape: np.moveaxis(
            reshaped(
                tensor,
                (3 * shape[1] * shape[2], shape[0]),
                (shape[1], 3, shape[2], shape[0]),
            )[:, part],
            -1,
            0,
        ),
        lambda parts: np.stack([np.moveaxis(p, 0, -1) for p in parts], 1).reshape(
            -1, len(parts[0])
        ),
    )


def biases_of_three(path: str) -> Rule:
    """The bias of `heads_of_three`."""
    return Rule(
        _three(path, "bias"),
        lambda tensor, part, shape: reshaped(
            tensor, (3 * shape[0] * shape[1],), (shape[0], 3, shape[1])
        )[:, part],
        lambda parts: np.stack(parts, 1).reshape(-1),
    )


def _three(path: str, leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}.{leaf}" for name in ("query", "key", "value"))


def reshaped(
    tensor: np.ndarray, stored: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """A tensor whose axes are split or joined; ValueError where it is not `stored`."""
    if tensor.shape != stored:
        raise ValueError
    return tensor.reshape(shape)


def _transpose(tensor: np.ndarray, shape: tuple[int, ...], inputs: int) -> np.ndarray:
    ins, outs = shape[:inputs], shape[inputs:]
    if tensor.shape != (np.prod(outs, dtype=int), np.prod(ins, dtype=int)):
        raise ValueError
    tensor = tensor.reshape(*outs, *ins)
    return np.moveaxis(tensor, range(len(outs)), range(-len(outs), 0))


def as_pattern(template: str) -> str:
    """The regular expression of a template."""
    pattern = re.escape(template)
    pattern = re.sub(r"\\\((.*?)\\\)", r"(?:\1)?", pattern)
    pattern = pattern.replace(r"\{layer\}", r"(?P<layer>0|[1-9][0-9]{0,8})")
    return pattern.replace(r"\{any\}", ".*")


def spelled(template: str, layer: int | None) -> str:
    """The name that a template stands for, with its optional parts."""
    name = template.replace("(", "").replace(")", "")
    return name if layer is None else name.replace("{layer}", str(layer))
