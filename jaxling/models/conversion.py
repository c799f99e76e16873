"""From a checkpoint's tensors to a model's parameters, by rule, and back.

Every tensor is used or ignored by a rule, every parameter is filled. Values move once,
with the cast, from the mapped file into the stacked parameter that is allocated for
them; with a mesh, only those of the shards that the devices of this process hold.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxling.checkpoints import Checkpoint, CheckpointError

from .config import Family, abstract
from .decoder import Language
from .model import Model
from .rules import OTHER_HEADS, Alias, Ignore, Rule, Rules, as_pattern, spelled


class Slot(NamedTuple):
    """Where a parameter, or one layer of it, comes from."""

    tensor: str
    rule: Rule
    part: int


def load(
    checkpoint: Checkpoint,
    family: Family,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """The model of a checkpoint; see `jaxling.models.load`."""

    def amend(spec: Any) -> Any:
        spec = spec if family.amend is None else family.amend(spec, checkpoint)
        untied = family.rules(spec._replace(tied=False))
        own = _filling(checkpoint, untied, "unembedding")
        if isinstance(spec, Language) and not (spec.tied or own):
            spec = spec._replace(head=not _headless(checkpoint))
            return spec._replace(tied=not spec.head)
        return spec._replace(tied=spec.tied and is_tied(checkpoint, untied))

    model = abstract(checkpoint.config, family, str(checkpoint.path), amend)
    graph, state = nnx.split(model)
    shapes = {
        ".".join(map(str, path)): tuple(value.shape)
        for path, value in nnx.to_flat_state(state)
    }
    rules = {**OTHER_HEADS, **family.rules(model.spec)}
    plan = _plan(checkpoint, rules, shapes)
    if dtype is None:  # one of all, for the scan carries the stream from part to part
        slots = [slot for layers in plan.values() for slot in layers.values()]
        stored = {checkpoint.dtype(slot.tensor) for slot in slots}
        dtype = jnp.result_type(*stored)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        array = _fill(checkpoint, plan[name], shapes[name], dtype, mesh)
        filled.append((path, variable.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _plan(
    checkpoint: Checkpoint, rules: Rules, shapes: dict[str, tuple[int, ...]]
) -> dict[str, dict[int | None, Slot]]:
    """Which tensors make up each parameter, by layer (None where there are none).

    Raises:
      CheckpointError: tensors without a rule, tensors and layers that are missing,
        shapes that differ, dtypes that are no floats; all are named.
    """
    patterns = [(re.compile(as_pattern(name)), rule) for name, rule in rules.items()]
    plan: dict[str, dict[int | None, Slot]] = {name: {} for name in shapes}
    unknown, wrong, found = [], [], []
    for tensor in checkpoint.tensor_names:
        fitting = [(m, rule) for p, rule in patterns if (m := p.fullmatch(tensor))]
        if len(fitting) == 1:
            found.append((tensor, *fitting[0]))
        else:
            unknown.append(tensor)
    # Aliases last, for they count only where the tensor that they stand for is absent.
    for tensor, match, rule in sorted(found, key=lambda f: isinstance(f[2], Alias)):
        if isinstance(rule, Ignore):
            continue
        layer = match.groupdict().get("layer")
        layer = None if layer is None else int(layer)
        if isinstance(rule, Alias):
            alias, rule = rule, rules[rule.of]
            assert isinstance(rule, Rule), f"{alias} is of no tensor that is read"
            if layer in plan[rule.paths[0]]:
                original = plan[rule.paths[0]][layer].tensor
                if alias.copy and not checkpoint.equal(tensor, original):
                    wrong.append(f"{tensor} is a copy of {original} and differs")
                continue
        if not jnp.issubdtype(checkpoint.dtype(tensor), jnp.floating):
            wrong.append(f"{tensor} holds {checkpoint.dtype(tensor)}")
        for part, path in enumerate(rule.paths):
            shape = shapes[path]
            if layer is not None and layer >= shape[0]:
                unknown.append(tensor)
                break
            if layer in plan[path]:
                wrong.append(f"{tensor} and {plan[path][layer].tensor} are the same")
            plan[path][layer] = Slot(tensor, rule, part)
            stored = checkpoint.shape(tensor)
            try:  # on a stand-in, for no byte has to be read
                expected = shape if layer is None else shape[1:]
                rule.view(np.broadcast_to(np.int8(0), stored), part, expected)
            except ValueError:
                wrong.append(
                    f"{tensor} has shape {list(stored)}, for {path} {list(expected)}"
                )
                break
    missing = []
    for template, rule in rules.items():
        if isinstance(rule, Rule):
            path = rule.paths[0]
            stacked = "{layer}" in template
            for layer in range(shapes[path][0]) if stacked else (None,):
                if layer not in plan[path]:
                    missing.append(spelled(template, layer))
    unfilled = [
        path
        for path in shapes
        if not any(
            path in rule.paths for rule in rules.values() if isinstance(rule, Rule)
        )
    ]
    problems = [
        f"{problem}: {_listed(names)}"
        for problem, names in (
            ("unknown tensors", unknown),
            ("missing tensors", missing),
            ("tensors that do not fit", wrong),
            ("parameters without a rule", unfilled),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit its config.json: {'; '.join(problems)}."
        )
    return plan


def _listed(names: list[str], most: int = 20) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _fill(
    checkpoint: Checkpoint,
    slots: dict[int | None, Slot],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    mesh: Mesh | None,
) -> jax.Array:
    """One parameter, its layers stacked, cast while it is read."""

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        index = (slice(None),) * len(shape) if index is None else index
        sizes = [len(range(n)[at]) for n, at in zip(shape, index)]
        values = aligned(sizes, np.dtype(dtype))
        for layer, slot in slots.items():
            to, of, own = values, index, shape
            if layer is not None:
                layers = range(shape[0])[index[0]]
                if layer not in layers:
                    continue
                to, of, own = values[layers.index(layer)], index[1:], shape[1:]
            to[...] = slot.rule.view(checkpoint.read(slot.tensor), slot.part, own)[of]
        return values

    if mesh is None:
        return jax.device_put(read(None))
    return jax.make_array_from_callback(shape, sharding(shape, slots, mesh), read)


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that XLA on a CPU takes over as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def sharding(
    shape: tuple[int, ...], slots: Mapping[int | None, Slot], mesh: Mesh
) -> NamedSharding:
    """Splits a parameter over all devices of the mesh, along its longest axis.

    The axis of layers is left whole, for the scan takes one layer at a time. Where no
    axis is a multiple of the number of devices the parameter is on all of them.
    """
    # Of Auto axes: what stands where inside a model is the compiler's to decide.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    first = 0 if None in slots else 1
    axes = [i for i in range(first, len(shape)) if shape[i] % mesh.size == 0]
    spec: list[Any] = [None] * len(shape)
    if axes:
        spec[max(axes, key=lambda i: shape[i])] = mesh.axis_names
    return NamedSharding(mesh, PartitionSpec(*spec))


def has(checkpoint: Checkpoint, template: str) -> bool:
    """Whether a tensor fits a rule's template."""
    return _named(checkpoint, template) is not None


def is_tied(checkpoint: Checkpoint, untied: Rules) -> bool:
    """Whether the unembedding can be the embedding, by the rules of an untied spec.

    Old files store tied matrices twice, and configs call matrices tied that are not:
    what is stored decides, the values where there are two. So does transformers 5.
    """
    first = _filling(checkpoint, untied, "embedding")
    second = _filling(checkpoint, untied, "unembedding")
    if second is None:
        return True
    return first is not None and checkpoint.equal(first, second)


def _headless(checkpoint: Checkpoint) -> bool:
    """Whether the config says that it is of no language model (an embedder's, say)."""
    said = checkpoint.config.get("architectures")
    said = said if isinstance(said, list) else []
    speaking = ("ForCausalLM", "LMHeadModel")
    return bool(said) and not any(str(name).endswith(speaking) for name in said)


def _filling(checkpoint: Checkpoint, rules: Rules, path: str) -> str | None:
    """The tensor that fills a parameter, where there is one."""
    for template, rule in rules.items():
        if isinstance(rule, Rule) and rule.paths == (path,):
            return _named(checkpoint, template)
    return None


def _named(checkpoint: Checkpoint, template: str) -> str | None:
    pattern = re.compile(as_pattern(template))
    return next(
        (name for name in checkpoint.tensor_names if pattern.fullmatch(name)), None
    )


def tensors(model: Model, family: Family) -> dict[str, np.ndarray]:
    """The tensors that a checkpoint of the model holds, by name."""
    parameters = {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    found = {}
    for template, rule in family.rules(model.spec).items():
        if isinstance(rule, Rule):
            arrays = [np.asarray(parameters[path][...]) for path in rule.paths]
            stacked = "{layer}" in template
            for layer in range(len(arrays[0])) if stacked else (None,):
                parts = arrays if layer is None else [a[layer] for a in arrays]
                found[spelled(template, layer)] = rule.join(parts)
    return found


SHARD = 2 * 2**30  # bytes of a file
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(
    r"model\.safetensors(\.index\.json)?|model-[0-9]+-of-[0-9]+\.safetensors"
)


def save(model: Model, family: Family, directory: str | os.PathLike) -> None:
    """Writes a Hugging Face directory; see `jaxling.models.save`."""
    from safetensors.numpy import save_file

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = tensors(model, family)
    dtypes = {str(array.dtype) for array in found.values()}
    config = model.config
    config.pop("torch_dtype", None)
    config["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in found.items():
        if size + array.nbytes > SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        files |= dict.fromkeys(names, file)
        # Transposed back one shard at a time: the model is not held twice. Metadata,
        # for transformers reads no file that does not say that it is torch's.
        part = {name: np.ascontiguousarray(found[name]) for name in names}
        save_file(part, directory / f"{file}.partial", metadata={"format": "pt"})
        os.replace(directory / f"{file}.partial", directory / file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": files}
        _write_json(directory / INDEX, index)
    _write_json(directory / "config.json", config)
    # What an earlier save left here would be read in place of this one, or beside it.
    current = {*files.values(), *([INDEX] if len(shards) > 1 else [])}
    for path in list(directory.iterdir()):
        if WEIGHTS.fullmatch(path.name) and path.name not in current:
            path.unlink()


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
