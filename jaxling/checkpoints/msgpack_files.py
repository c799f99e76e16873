"""The container of Flax: nested maps in MessagePack, arrays as extensions in them.

https://github.com/msgpack/msgpack/blob/master/spec.md; the array extension is that of
`flax.serialization`: the packed triple (shape, dtype's name, bytes). `msgpack` itself
would load every array; this walk steps from header to header over the mapped file, so
that one tensor can be read alone.

Tensors are presented by the names that torch gives them, by one generic rule (see
`torch_name`), so that one table of a family serves all containers.
"""

import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxling.checkpoints.tensors import (
    DTYPES,
    MOST_TENSORS,
    CheckpointError,
    Stored,
    checked_shape,
    mapped,
    short,
)

DEEPEST = 64
ARRAY, COMPLEX, SCALAR = 1, 2, 3  # flax's extension codes
CHUNKED = "__msgpack_chunked_array__"

# Leaves of torch's modules by their Flax name; every other name is the same in both.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}

# First byte -> (kind, struct format of the length or value that follows).
_HEADS = {
    0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"),
    0xC7: ("extension", ">B"), 0xC8: ("extension", ">H"), 0xC9: ("extension", ">I"),
    0xCA: ("number", ">f"), 0xCB: ("number", ">d"),
    0xCC: ("number", ">B"), 0xCD: ("number", ">H"),
    0xCE: ("number", ">I"), 0xCF: ("number", ">Q"),
    0xD0: ("number", ">b"), 0xD1: ("number", ">h"),
    0xD2: ("number", ">i"), 0xD3: ("number", ">q"),
    0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"),
    0xDC: ("array", ">H"), 0xDD: ("array", ">I"),
    0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def torch_name(parts: Sequence[str]) -> str:
    """The name in torch of the Flax parameter at this path.

    >>> torch_name(["encoder", "layer", "0", "attention", "query", "kernel"])
    'encoder.layer.0.attention.query.weight'
    """
    return ".".join([*parts[:-1], LEAVES.get(parts[-1], parts[-1])])


def tensors(path: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of one file, as views of it, by its torch name.

    The kernel of a linear layer lies as `[in, out]` and is presented as the weight
    `[out, in]`.
    """
    walk = _Walk(path, mapped(path))
    tree = walk.value(0)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is not a map of parameters.")
    if walk.at != len(walk.data):
        raise CheckpointError(
            f"{path} holds {len(walk.data) - walk.at} bytes after its parameters."
        )
    found: dict[str, Stored] = {}
    for parts, stored in _leaves(tree, ()):
        name = torch_name(parts)
        if name in found:
            raise CheckpointError(f"{path}: tensor {short(name)} stands there twice.")
        if parts[-1] == "kernel" and len(stored.shape) == 2:
            stored = stored._replace(shape=stored.shape[::-1], transposed=True)
        found[name] = stored
    return found


def _leaves(
    tree: dict[str, Any], parts: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Stored]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*parts, name))
        elif isinstance(value, Stored):
            yield (*parts, name), value


class _Walk:
    """A walk over one file: where it is, and how much more it may find."""

    def __init__(self, path: pathlib.Path, content: np.ndarray):
        self.path = path
        self.content = content
        self.data = content.data
        self.at = 0
        # A tensor takes about eight values: its name, shape, sizes, dtype, bytes.
        self.left = 8 * MOST_TENSORS

    def wrong(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}, byte {self.at}: {problem}.")

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > len(self.data) - self.at:
            raise self.wrong(
                f"{count} bytes are due and {len(self.data) - self.at} are left; the"
                " file is truncated or is not a Flax checkpoint"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def head(self) -> tuple[str, Any]:
        """Kind of the next value, and its length or, of numbers, itself."""
        first = self.take(1)[0]
        if first < 0x80:
            return "number", first
        if first < 0xC0:
            kind = "map" if first < 0x90 else "array" if first < 0xA0 else "text"
            return kind, first & (0x1F if kind == "text" else 0x0F)
        if first >= 0xE0:
            return "number", first - 0x100
        if first in _CONSTANTS:
            return "constant", _CONSTANTS[first]
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << (first - 0xD4)
        if first not in _HEADS:
            raise self.wrong(f"{first:#x} begins no value; this is not MessagePack")
        kind, form = _HEADS[first]
        return kind, struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        """The next value; arrays come as `Stored`, runs of bytes as views."""
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            raise self.wrong("there are too many values or levels of them")
        kind, length = self.head()
        if kind in ("number", "constant"):
            return length
        if kind == "text":
            return self.text(length)
        if kind == "bytes":
            start = self.at
            self.take(length)
            return self.content[start : self.at]
        if kind == "array":
            return [self.value(depth + 1) for _ in range(length)]
        if kind == "map":
            return self.map(length, depth)
        return self.extension(length, depth)

    def text(self, length: int) -> str:
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong("a name is not UTF-8") from error

    def map(self, length: int, depth: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(length):
            name = self.value(depth + 1)
            if not isinstance(name, str):
                raise self.wrong(f"{short(name)} is not a name")
            if name in found:
                raise self.wrong(f"{short(name)} stands there twice")
            found[name] = self.value(depth + 1)
        return self.joined(found) if CHUNKED in found else found

    def extension(self, length: int, depth: int) -> Any:
        code = self.take(1)[0]
        stop = self.at + length
        if code == COMPLEX:
            self.take(length)
            return None
        if code not in (ARRAY, SCALAR):
            raise self.wrong(f"extension {code} is not one of Flax")
        triple = self.value(depth + 1)
        if self.at != stop or not isinstance(triple, list) or len(triple) != 3:
            raise self.wrong("an array is not (shape, dtype, bytes)")
        shape, named, data = triple
        if not isinstance(named, str) or named not in DTYPES:
            raise self.wrong(f"unknown dtype {short(named)}")
        where = f"{self.path}, byte {self.at}"
        shape, size = checked_shape(shape, DTYPES[named], where)
        if not isinstance(data, np.ndarray) or data.size != size:
            raise self.wrong(
                f"an array of shape {list(shape)} and dtype {named} needs {size} bytes"
            )
        return Stored(shape, DTYPES[named], (data.view(DTYPES[named]),))

    def joined(self, found: dict[str, Any]) -> Stored:
        """An array above 1 GiB, which flax cuts: the shape, and flat chunks."""
        sizes, chunks = (self.numbered(found.get(key)) for key in ("shape", "chunks"))
        if not chunks or not all(isinstance(chunk, Stored) for chunk in chunks):
            raise self.wrong("a chunked array has no chunks")
        pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
        dtype = chunks[0].dtype
        shape, size = checked_shape(sizes, dtype, f"{self.path}, byte {self.at}")
        if any(piece.dtype != dtype for piece in pieces) or size != sum(
            piece.nbytes for piece in pieces
        ):
            raise self.wrong(f"chunks do not make up an array of shape {list(shape)}")
        return Stored(shape, dtype, pieces)

    def numbered(self, entries: Any) -> list[Any]:
        """The values of a map whose names are 0, 1, 2, ..."""
        if not isinstance(entries, dict) or sorted(entries) != sorted(
            map(str, range(len(entries)))
        ):
            raise self.wrong("a chunked array is not numbered from 0")
        return [entries[str(number)] for number in range(len(entries))]
