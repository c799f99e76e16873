"""The door: `open_checkpoint` and what it returns."""

import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from jaxling.checkpoints import (
    embeddings,
    msgpack_files,
    safetensors_files,
    sources,
    tensors,
    torch_files,
)
from jaxling.checkpoints.tensors import CheckpointError, Stored, short

# In the order of preference: no container above needs the one below it.
CONTAINERS = {
    "model.safetensors": safetensors_files.tensors,
    "flax_model.msgpack": msgpack_files.tensors,
    "pytorch_model.bin": torch_files.tensors,
}


class Checkpoint:
    """Named tensors of a model, each read when asked for and alone.

    `path` is the directory. A checkpoint in several files opens the file of a tensor
    when it is first asked about; from the hub that file is fetched then, so that one
    matrix of a large model costs the download of one file.
    """

    def __init__(
        self,
        path: pathlib.Path,
        files: Mapping[str, str],
        open_file: Callable[[str], dict[str, Stored]],
    ):
        self.path = path
        self._files = files
        self._open = functools.cache(open_file)

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors, in the order in which the files list them."""
        return list(self._files)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` as it is; empty where there is none.

        Raises:
          CheckpointError: it is not a JSON object.
        """
        path = tensors.inside(self.path, "config.json")
        return tensors.read_object(path) if path.exists() else {}

    def _stored(self, name: str) -> Stored:
        if name not in self._files:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}; its matrices: "
                + ", ".join(self._matrices())
            )
        found = self._open(self._files[name])
        if name not in found:
            raise CheckpointError(
                f"{self.path / self._files[name]}: tensor {short(name)} is missing,"
                " though the index says that it is there."
            )
        return found[name]

    def check(self) -> None:
        """Opens every file, fetching what is not there.

        Raises:
          CheckpointError: a file or a tensor is missing or damaged.
        """
        for name in self._files:
            self._stored(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._stored(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor as stored; bfloat16 is `ml_dtypes.bfloat16`."""
        return self._stored(name).dtype

    def read(
        self,
        name: str,
        rows: slice | Sequence[int] | np.ndarray | None = None,
        dtype: DTypeLike | None = None,
    ) -> np.ndarray:
        """A tensor, or some rows of it; other bytes of the file are not touched.

        Args:
          name: one of `tensor_names`.
          rows: None (all), a slice, or row numbers in any order (in [0, n)).
          dtype: what to convert to; None keeps the stored one.

        Returns:
          An array. Where nothing had to be converted or gathered it is a read-only
          view of the mapped file, which costs no memory until it is touched.

        Raises:
          CheckpointError: no such tensor, or its file is damaged.
          ValueError: the rows are not there.
        """
        stored = self._stored(name)
        if rows is not None:
            if not stored.shape:
                raise ValueError(f"`rows` asks for rows of {name!r}, a scalar.")
            if not isinstance(rows, slice):
                rows = np.asarray(rows)
                n = stored.shape[0]
                if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
                    raise ValueError("`rows` must be a slice or a list of row numbers.")
                if rows.size and (rows.min() < 0 or rows.max() >= n):
                    raise ValueError(
                        f"`rows` must be in [0, {n}), the rows of {name!r}; got"
                        f" {rows.min()} to {rows.max()}."
                    )
                rows = rows.astype(np.int64)
        found = tensors.read(stored, rows)
        return found if dtype is None else found.astype(np.dtype(dtype), copy=False)

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's dtype, shape and bytes, for the record of a run."""
        stored = self._stored(name)
        known = hashlib.sha256(f"{stored.dtype.name} {list(stored.shape)} ".encode())
        count = 1 if not stored.shape else stored.shape[0]
        step = max(1, count * 2**24 // max(1, sum(p.nbytes for p in stored.pieces)))
        for start in range(0, count, step):
            rows = slice(start, start + step) if stored.shape else None
            known.update(np.ascontiguousarray(self.read(name, rows)).tobytes())
        return known.hexdigest()

    def equal(self, first: str, second: str) -> bool:
        """Whether two matrices or vectors are the same, byte by byte."""
        shape = self.shape(first)
        if shape != self.shape(second):
            return False
        step = max(1, 2**22 // max(1, math.prod(shape[1:])))
        return all(
            self.read(first, rows).tobytes() == self.read(second, rows).tobytes()
            for start in range(0, shape[0], step)
            for rows in [slice(start, start + step)]
        )

    def input_embeddings(self, tensor: str | None = None) -> str:
        """Name of the token embedding matrix, `[vocab, d]`.

        Args:
          tensor: the answer, where the caller knows it (`--tensor=NAME`); checked.

        Raises:
          CheckpointError: the family is unknown; the message lists the candidates.
        """
        if tensor is not None:
            return self._matrix(tensor)
        family = self._family()
        return self._one(embeddings.matching(family.inputs, self._files))

    def output_embeddings(self, tensor: str | None = None) -> str:
        """Name of the unembedding matrix, `[vocab, d]`; where tied, the input's.

        A matrix of its own that differs is not tied, whatever the config says.

        Raises:
          CheckpointError: the family is unknown, or the model has no output head.
        """
        if tensor is not None:
            return self._matrix(tensor)
        family = self._family()
        own = embeddings.matching(family.outputs, self._files)
        ties = embeddings.tied(self.config)
        if own and not (ties and self.equal(self._one(own), self.input_embeddings())):
            return self._one(own)
        if (
            family.head
            and not own
            and not embeddings.matching(family.head, self._files)
        ):
            raise CheckpointError(
                f"{self.path} has no output embeddings: it was saved without a head"
                f" ({family.head[0]!r} is not there)."
            )
        if ties is False:
            raise CheckpointError(
                f"{self.path} has no output embeddings: config.json says that they are"
                f" not tied to the input's, and {family.outputs[0]!r} is not there."
            )
        return self.input_embeddings()

    def _family(self) -> embeddings.Family:
        kind = self.config.get("model_type")
        if not isinstance(kind, str) or kind not in embeddings.FAMILIES:
            raise CheckpointError(
                f"{self.path}: {short(kind)} (model_type in config.json) is not a"
                f" family whose embeddings are known. {self._advice()}"
            )
        return embeddings.FAMILIES[kind]

    def _one(self, found: list[str]) -> str:
        if len(found) != 1:
            problem = (
                f"several tensors could be the embeddings: {found}"
                if found
                else "no tensor is called as the embeddings of its family are"
            )
            raise CheckpointError(f"{self.path}: {problem}. {self._advice()}")
        return self._matrix(found[0])

    def _matrix(self, name: str) -> str:
        shape, dtype = self.shape(name), self.dtype(name)
        if len(shape) != 2 or not _is_float(dtype):
            raise CheckpointError(
                f"{self.path / self._files[name]}: tensor {name!r} has shape"
                f" {list(shape)} and dtype {dtype.name}; embeddings are a matrix of"
                f" floats. {self._advice()}"
            )
        return name

    def _advice(self) -> str:
        return "Choose one with --tensor=NAME: " + ", ".join(self._matrices())

    def _matrices(self, most: int = 8) -> list[str]:
        """Matrices of floats in the files at hand, longest first, for a message."""
        here = {file for file in self._files.values() if (self.path / file).exists()}
        shapes = {
            name: self.shape(name) for name in self._files if self._files[name] in here
        }
        matrices = [
            name
            for name in shapes
            if len(shapes[name]) == 2 and _is_float(self.dtype(name))
        ]
        matrices.sort(key=lambda name: -shapes[name][0])
        listed = [f"{name} {list(shapes[name])}" for name in matrices]
        # What no file at hand describes is not fetched for a message.
        listed += [name for name in self._files if name not in shapes and "emb" in name]
        more = len(listed) - most
        return listed[:most] + [f"and {more} more"] * (more > 0)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind not in "biu"  # those of ml_dtypes are of kind V


def open_checkpoint(
    path_or_id: str | os.PathLike, revision: str | None = None
) -> Checkpoint:
    """Opens a checkpoint: headers are read and checked, tensors are not.

    Args:
      path_or_id: a built-in name, a directory, or a hub id; see `locate`.
      revision: of a hub id: branch, tag, commit, or `refs/pr/N`.

    Raises:
      CheckpointError: there is none, or it is damaged; one paragraph that names the
        file and the tensor.
    """
    path = sources.locate(path_or_id, revision, ["config.json", "*.index.json"])
    local = sources.is_local(path_or_id)

    def fetched(file: str) -> pathlib.Path:
        target = tensors.inside(path, file)
        if not local and not target.exists():
            try:  # The snapshot's name is its commit: all files are of one revision.
                sources.locate(path_or_id, path.name, [file])
            except CheckpointError as error:
                raise CheckpointError(f"{file} is not at hand: {error}") from error
        return target

    for container, reader in CONTAINERS.items():
        if (single := fetched(container)).exists():
            found = reader(single)
            files = dict.fromkeys(found, container)
            return Checkpoint(path, files, {container: found}.__getitem__)
        if (index := tensors.inside(path, f"{container}.index.json")).exists():
            return _indexed(path, index, reader, fetched, local)
    raise CheckpointError(
        f"{path} holds no checkpoint: there is none of {', '.join(CONTAINERS)}, nor an"
        " index of one."
    )


def _indexed(
    path: pathlib.Path,
    index: pathlib.Path,
    reader: Callable[[pathlib.Path], dict[str, Stored]],
    fetched: Callable[[str], pathlib.Path],
    local: bool,
) -> Checkpoint:
    files = _weight_map(index, paths=reader is msgpack_files.tensors)

    def open_file(file: str) -> dict[str, Stored]:
        found = reader(fetched(file))
        for name in found:
            if files.get(name, file) != file:
                raise CheckpointError(
                    f"{path / file}: tensor {short(name)} stands here and, says the"
                    f" index, in {files[name]}."
                )
        return found

    checkpoint = Checkpoint(path, files, open_file)
    if local:  # nothing to fetch: damage is found now
        checkpoint.check()
    return checkpoint


def _weight_map(index: pathlib.Path, paths: bool) -> dict[str, str]:
    """Which file holds which tensor, as `*.index.json` says; Flax's lists paths."""
    files = tensors.read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{index} has no weight_map.")
    found = {}
    for listed, file in files.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{index}: tensor {short(listed)} is in {short(file)}."
            )
        tensors.inside(index.parent, file)
        name = msgpack_files.torch_name(listed.split("/")) if paths else listed
        if name in found:
            raise CheckpointError(f"{index}: tensor {short(name)} stands there twice.")
        found[name] = file
    return found
