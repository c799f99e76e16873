"""From a checkpoint's tensors to a model's parameters, by rule, and back.

A family is a `Family`: which attributes of `config.json` it understands, the spec they
make, and a table of rules from templates of tensor names. In a template `{layer}` is
the number of a block, `{any}` is anything, and a part in parentheses may be absent;
nothing else is special, and the whole name must fit. A rule names the parameters that
the tensor fills, by their path in the model, and how; or why it is not needed.

Conversions are views: indexing, reshaping and transposing a mapped tensor reads
nothing. Values move once, with the cast, into the stacked parameter that is allocated
for them; with a mesh, only those of the shards that the devices of this process hold.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxling.checkpoints import Checkpoint, CheckpointError

from .model import Model


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


class Family(NamedTuple):
    """One file of this package.

    `attributes` are those of `config.json` that `spec` reads, with the values that
    transformers assumes where they are absent; `fixed` are those that must have one of
    the values listed; `ignored` do not change what an inference computes. Where the
    tensors decide what the config leaves open (is there a head?), `amend` does.
    """

    model: type[Model]
    attributes: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    spec: Callable[[dict[str, Any]], Any]
    rules: Callable[[Any], Rules]
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}  # other spelling -> the one in `attributes`
    amend: Callable[[Any, Checkpoint], Any] | None = None


# Attributes of any family that name tokens, training, generation or bookkeeping.
IGNORED = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype",
    "_name_or_path", "name_or_path", "_attn_implementation_autoset", "auto_map",
    "attn_implementation", "_attn_implementation", "use_cache",
    "gradient_checkpointing",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "mask_token_id",
    "unk_token_id", "cls_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "initializer_range", "initializer_factor", "init_std",
    "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout",
    "attention_probs_dropout_prob", "activation_dropout", "classifier_dropout",
    "classifier_dropout_prob", "dropout_rate", "attn_pdrop", "embd_pdrop",
    "resid_pdrop", "layerdrop", "encoder_layerdrop", "decoder_layerdrop",
    "finetuning_task", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "tokenizer_class", "prefix", "language", "torchscript",
    "output_attentions", "output_hidden_states", "return_dict", "use_return_dict",
    "max_length", "min_length", "num_beams", "length_penalty", "early_stopping",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
    "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens",
    "max_new_tokens", "_commit_hash", "directionality", "output_past",
    "cache_implementation", "chunk_size_feed_forward",
}  # fmt: skip


# Beyond any published model; bounds what a hostile config can cost.
MOST_LAYERS = 10_000


def read_config(raw: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """All attributes that the family's spec reads, checked.

    An attribute that is neither understood nor known to be harmless must be off (None,
    False or empty), for it may change the mathematics.

    Raises:
      CheckpointError: unhandled attributes, values or types; all are named.
    """
    problems, found = [], {}
    for name, value in raw.items():
        name = family.aliases.get(name, name)
        if name in family.attributes:
            usual = family.attributes[name]
            if not _of_kind(value, usual):
                problems.append(f"{name} is {value!r:.80} (usually {usual!r})")
            elif "layer" in name and isinstance(value, int) and value > MOST_LAYERS:
                problems.append(f"{name} is {value}, more than {MOST_LAYERS}")
            found[name] = value
        elif name in family.fixed:
            if value not in family.fixed[name]:
                allowed = " or ".join(map(repr, family.fixed[name]))
                problems.append(f"{name} is {value!r:.80}; handled is {allowed}")
        elif name not in IGNORED and name not in family.ignored:
            if value not in (None, False) and value != {} and value != []:
                problems.append(f"{name} = {value!r:.80} is not handled")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(sorted(problems))}.")
    return {**family.attributes, **found}


def abstract(
    raw: Mapping[str, Any],
    family: Family,
    where: str,
    checkpoint: Checkpoint | None = None,
) -> Model:
    """The model that a config describes, with shapes in the place of arrays.

    What the config leaves open, the tensors of the checkpoint decide.

    Raises:
      CheckpointError: the config describes no model that is handled.
    """
    config, config_json = read_config(raw, family, where), json.dumps(dict(raw))
    try:
        spec = family.spec(config)
        if family.amend is not None and checkpoint is not None:
            spec = family.amend(spec, checkpoint)
        return nnx.eval_shape(lambda: family.model(spec, config_json, rngs=nnx.Rngs(0)))
    except KeyError as error:
        raise CheckpointError(f"{where}: {error} is missing.") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        # Of several lines, the first is the family's; the rest is the tracer's.
        message = str(error).split("\n")[0]
        raise CheckpointError(f"{where}: {message}.") from error


def _of_kind(value: Any, usual: Any) -> bool:
    if usual is None or value is None:
        return True
    if isinstance(usual, bool) or isinstance(usual, str):
        return type(value) is type(usual)
    if isinstance(usual, int):
        return type(value) is int and value >= min(usual, 1)
    if isinstance(usual, float):
        return type(value) in (int, float)
    return isinstance(value, type(usual))


# Rules that most families need.


def same(path: str) -> Rule:
    """The tensor as it is; an axis may be split into heads and sizes."""
    return Rule((path,), _split, lambda parts: parts[0])


def vector(path: str) -> Rule:
    """A bias or scale, whose heads and sizes are one axis in the file."""
    return Rule((path,), _split, lambda parts: parts[0].reshape(-1))


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


def heads_of_three(path: str) -> Rule:
    """Query, key and value as one kernel, `[head, (q, k, v), size]` by `d` in torch."""
    return Rule(
        _three(path, "kernel"),
        lambda tensor, part, shape: np.moveaxis(
            tensor.reshape(shape[1], 3, shape[2], shape[0])[:, part], -1, 0
        ),
        lambda parts: np.stack([np.moveaxis(p, 0, -1) for p in parts], 1).reshape(
            -1, len(parts[0])
        ),
    )


def biases_of_three(path: str) -> Rule:
    """The bias of `heads_of_three`."""
    return Rule(
        _three(path, "bias"),
        lambda tensor, part, shape: tensor.reshape(shape[0], 3, shape[1])[:, part],
        lambda parts: np.stack(parts, 1).reshape(-1),
    )


def _three(path: str, leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}.{leaf}" for name in ("query", "key", "value"))


def _split(tensor: np.ndarray, part: int, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape != shape and tensor.shape != (np.prod(shape, dtype=int),):
        raise ValueError
    return tensor.reshape(shape)


def _transpose(tensor: np.ndarray, shape: tuple[int, ...], inputs: int) -> np.ndarray:
    ins, outs = shape[:inputs], shape[inputs:]
    if tensor.shape != (np.prod(outs, dtype=int), np.prod(ins, dtype=int)):
        raise ValueError
    tensor = tensor.reshape(*outs, *ins)
    return np.moveaxis(tensor, range(len(outs)), range(-len(outs), 0))


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
    model = abstract(checkpoint.config, family, str(checkpoint.path), checkpoint)
    graph, state = nnx.split(model)
    shapes = {
        ".".join(path): tuple(value.shape) for path, value in nnx.to_flat_state(state)
    }
    plan = _plan(checkpoint, family.rules(model.spec), shapes)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(path)
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
    patterns = [(re.compile(_pattern(name)), rule) for name, rule in rules.items()]
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
            if layer in plan[rule.paths[0]]:
                original = plan[rule.paths[0]][layer].tensor
                if alias.copy and not _equal(checkpoint, tensor, original):
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
    dtype: DTypeLike | None,
    mesh: Mesh | None,
) -> jax.Array:
    """One parameter, its layers stacked, cast while it is read."""
    if dtype is None:
        stored = [checkpoint.dtype(slot.tensor) for slot in slots.values()]
        dtype = jnp.result_type(*stored)

    def read(index: tuple[slice, ...]) -> np.ndarray:
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
        return jax.device_put(read((slice(None),) * len(shape)))
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


def is_tied(checkpoint: Checkpoint, embedding: str, unembedding: str) -> bool:
    """Whether the unembedding is the embedding, by the tensors of these templates.

    Old files store tied matrices twice, and configs are wrong about it both ways: what
    is stored decides, the values where there are two.
    """
    first, second = _named(checkpoint, embedding), _named(checkpoint, unembedding)
    return first is None or second is None or _equal(checkpoint, first, second)


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two matrices or vectors are the same, byte by byte."""
    shape = checkpoint.shape(first)
    if shape != checkpoint.shape(second):
        return False
    step = max(1, 2**22 // max(1, math.prod(shape[1:])))
    return all(
        checkpoint.read(first, rows).tobytes()
        == checkpoint.read(second, rows).tobytes()
        for start in range(0, shape[0], step)
        for rows in [slice(start, start + step)]
    )


def _named(checkpoint: Checkpoint, template: str) -> str | None:
    pattern = re.compile(_pattern(template))
    return next(
        (name for name in checkpoint.tensor_names if pattern.fullmatch(name)), None
    )


def tensors(model: Model, family: Family) -> dict[str, np.ndarray]:
    """The tensors that a checkpoint of the model holds, by name."""
    parameters = {
        ".".join(path): variable
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
    files = {}
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
        _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", config)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")


def _pattern(template: str) -> str:
    pattern = re.escape(template)
    pattern = re.sub(r"\\\((.*?)\\\)", r"(?:\1)?", pattern)
    pattern = pattern.replace(r"\{layer\}", r"(?P<layer>0|[1-9][0-9]{0,8})")
    return pattern.replace(r"\{any\}", ".*")


def spelled(template: str, layer: int | None) -> str:
    """The name that a template stands for, with its optional parts."""
    name = template.replace("(", "").replace(")", "")
    return name if layer is None else name.replace("{layer}", str(layer))
