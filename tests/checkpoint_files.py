"""Checkpoints that differ from one that is there."""

import pathlib
import shutil
from collections.abc import Callable

import numpy as np
from safetensors.numpy import load_file, save_file

Tensors = dict[str, np.ndarray]


def rewritten(
    path: pathlib.Path, target: pathlib.Path, change: Callable[[Tensors], Tensors]
) -> pathlib.Path:
    """A copy at `target` in one file, its tensors changed by `change`."""
    whole: Tensors = {}
    for shard in path.glob("*.safetensors"):
        whole |= load_file(shard)
    target.mkdir(exist_ok=True)
    save_file(change(whole), target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(path / "config.json", target)
    return target
