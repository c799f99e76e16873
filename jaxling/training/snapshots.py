"""Snapshots of a run: written in the background, whole or not at all, and verified."""

import logging
import os
import pathlib
import warnings
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp


def _not_chatter(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "orbax" not in record.pathname


class Snapshot(NamedTuple):
    """What was restored: arrays in the shape they were saved, and their record."""

    step: int
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


class Snapshots:
    """The snapshots of one run, `<directory>/<step>/`, the newest `keep` of them.

    Orbax writes each to a temporary directory while training goes on, and gives it its
    name when it is complete. Checksums of the arrays are kept beside them, since the
    storage format does not notice a flipped bit by itself.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3):
        if keep < 2:
            raise ValueError(
                f"`keep` must be at least 2, so that a damaged snapshot has one"
                f" before it; got {keep}."
            )
        # Orbax reports its own construction line by line; what it warns of stays.
        logging.getLogger("absl").addFilter(_not_chatter)
        self.directory = pathlib.Path(directory).resolve()
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, tree: Any, record: dict[str, Any]) -> None:
        """Returns at once; the arrays of `tree` (`copied`) are written meanwhile.

        Waits for the snapshot before it, if that one is still being written.
        """
        arrays = _named(tree)
        record = {**record, "checksums": {n: _checksum(a) for n, a in arrays.items()}}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
            ),
        )

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def newest(self) -> pathlib.Path | None:
        """The directory of the newest complete snapshot."""
        self.wait()
        step = self._manager.latest_step()
        return None if step is None else self.directory / str(step)

    def restore(self) -> Snapshot | None:
        """The newest snapshot that is whole; None where there is none yet.

        A damaged one is set aside as `<step>.damaged`, with a warning that says so.

        Raises:
          ValueError: there are snapshots, and all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        failures = []
        for step in steps:
            try:
                snapshot = self._read(step)
            # Whatever a damaged file makes the reader raise, it is damaged.
            except Exception as error:  # noqa: BLE001
                reason = str(error).split("\n")[0][:200]
                failures.append(f"{self.directory / str(step)}: {reason}")
                continue
            if failures:
                self._set_aside([s for s in steps if s > step])
                warnings.warn(
                    f"Damaged snapshot ({'; '.join(failures)}); going on from the one"
                    f" before, {self.directory / str(step)}.",
                    stacklevel=2,
                )
            return snapshot
        if failures:
            raise ValueError(
                f"Every snapshot is damaged: {'; '.join(failures)}. Remove"
                f" {self.directory} to begin anew."
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        self._manager.close()
        for step in steps:
            path = self.directory / str(step)
            aside = path.with_name(f"{step}.damaged")
            number = 1
            while aside.exists():
                number += 1
                aside = path.with_name(f"{step}.damaged-{number}")
            os.replace(path, aside)
        self._manager = self._open()

    def _read(self, step: int) -> Snapshot:
        found = self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )
        record = dict(found["record"])
        checksums = record.pop("checksums")
        found = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore())
        )
        arrays = {name: np.asarray(leaf) for name, leaf in found["arrays"].items()}
        for name, checksum in checksums.items():
            if name not in arrays or _checksum(arrays[name]) != checksum:
                raise ValueError(f"{name} is not what was saved")
        return Snapshot(step, arrays, record)

    def close(self) -> None:
        """Waits for what is being written, and ends the writer."""
        self._manager.close()


def copied(tree: Any) -> Any:
    """The arrays on the host, as copies: steps overwrite the buffers they came from."""
    return jax.tree.map(np.array, tree)


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def like(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The restored arrays in the structure of `tree`.

    Raises:
      ValueError: names, shapes or dtypes differ.
    """
    expected = _named(tree)
    wrong = sorted(
        name
        for name in expected.keys() | arrays.keys()
        if name not in expected
        or name not in arrays
        or expected[name].shape != arrays[name].shape
        or expected[name].dtype != arrays[name].dtype
    )
    if wrong:
        raise ValueError(
            "The snapshot is of another model or optimiser; these differ:"
            f" {', '.join(wrong[:8])}."
        )
    structure = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, [arrays[name] for name in expected])


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
