"""One optimiser step and one evaluation, as compiled functions of plain arrays."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxling import kernels
from jaxling.models import Model

from .packing import Batch
from .recipe import Parameters, Recipe, optimizer, rate_factors

EVERYWHERE = PartitionSpec()
NORMALIZED = "ln_final.hook_normalized"


class Frame(NamedTuple):
    """Everything of a model but its parameters' values; hashable."""

    graph: Any
    structure: Any
    names: tuple[str, ...]

    def model(self, parameters: Parameters) -> Model:
        """The model with these parameters."""
        leaves = [parameters[name] for name in self.names]
        state = jax.tree.unflatten(self.structure, leaves)
        return nnx.merge(self.graph, state)


class State(NamedTuple):
    """What a step changes: parameters by name (float32) and the optimiser's moments."""

    parameters: Parameters
    moments: optax.OptState


class Metrics(NamedTuple):
    """Of one step: mean loss in nats per predicted token, and how many there were."""

    loss: Array
    gradient_norm: Array
    targets: Array


def take_apart(model: Model) -> tuple[Frame, Parameters]:
    """The frame of a model, and its parameters by dotted name, in float32."""
    graph, state = nnx.split(model)
    found, structure = jax.tree_util.tree_flatten_with_path(state)
    names = tuple(
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for path, _ in found
    )
    parameters = {
        name: jnp.array(leaf, jnp.float32) for name, (_, leaf) in zip(names, found)
    }
    return Frame(graph, structure, names), parameters


def loss_sums(
    frame: Frame, parameters: Parameters, batch: Batch, recipe: Recipe
) -> tuple[Array, Array]:
    """Summed loss of a batch in nats, and the number of predicted tokens."""
    model = frame.model(parameters)
    mask = batch.segments != 0
    segments: dict[str, Any] = {}
    if recipe.document_mask:
        segments = {"segment_ids": batch.segments}
    # The logits of the run are not used, and so never computed.
    _, cache = model.run_with_cache(
        batch.tokens,
        mask,
        names_filter=(NORMALIZED,),
        dtype=jnp.dtype(recipe.dtype),
        **segments,
    )
    hidden = cache[NORMALIZED][:, :-1]
    return kernels.cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        model.unembed_matrix,
        batch.tokens[:, 1:].reshape(-1),
        batch.targets[:, 1:].reshape(-1),
        bias=model.unembed_bias,
        softcap=model.logit_softcap,
    )


def initial_state(recipe: Recipe, parameters: Parameters) -> State:
    """The state before the first step; frozen parameters have no moments."""
    factors = rate_factors(recipe, list(parameters))
    trained = {name: parameters[name] for name in parameters if factors[name]}
    return State(parameters, optimizer(recipe, list(trained)).init(trained))


def place(tree: Any, mesh: Mesh | None, spec: PartitionSpec = EVERYWHERE) -> Any:
    """Puts host arrays on the devices: copies everywhere, or rows shared out."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    sharding = NamedSharding(mesh, spec)

    def put(array: Any) -> Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index]
        )

    return jax.tree.map(put, tree)


def place_batch(batch: Batch, parts: int, mesh: Mesh | None) -> Batch:
    """A batch as `[part, row, position]`, rows shared out over the mesh."""
    batch = Batch(*(a.reshape(parts, -1, a.shape[-1]) for a in batch))
    rows = PartitionSpec(None, None if mesh is None else mesh.axis_names)
    return place(batch, mesh, rows)


@functools.partial(
    jax.jit, static_argnames=("frame", "recipe", "mesh"), donate_argnames="state"
)
def train_step(
    frame: Frame,
    recipe: Recipe,
    mesh: Mesh | None,
    state: State,
    batch: Batch,
    rate: Array,
) -> tuple[State, Metrics]:
    """One step of the optimiser on `[part, row, position]` at learning rate `rate`."""
    factors = rate_factors(recipe, list(state.parameters))
    trained = {n: p for n, p in state.parameters.items() if factors[n]}
    frozen = {n: p for n, p in state.parameters.items() if not factors[n]}

    def sums(trained: Parameters, frozen: Parameters, batch: Batch):
        def loss(trained: Parameters, part: Batch):
            return loss_sums(frame, trained | frozen, part, recipe)

        def add(total, part):
            return jax.tree.map(jnp.add, total, of_part(trained, part)), None

        of_part = jax.value_and_grad(loss, has_aux=True)
        if recipe.accumulate == 1:
            total = of_part(trained, jax.tree.map(lambda a: a[0], batch))
        else:
            zero = (
                (jnp.float32(0), jnp.float32(0)),
                jax.tree.map(jnp.zeros_like, trained),
            )
            total, _ = lax.scan(add, zero, batch)
        return total if mesh is None else lax.psum(total, mesh.axis_names)

    if mesh is not None:
        rows = PartitionSpec(None, mesh.axis_names)
        sums = jax.shard_map(
            sums,
            mesh=mesh,
            in_specs=(EVERYWHERE, EVERYWHERE, rows),
            out_specs=EVERYWHERE,
            check_vma=False,
        )
    (loss, targets), gradients = sums(trained, frozen, batch)
    count = jnp.maximum(targets, 1.0)
    gradients = jax.tree.map(lambda g: g / count, gradients)
    metrics = Metrics(loss / count, optax.tree.norm(gradients), targets)
    updates, moments = optimizer(recipe, list(trained)).update(
        gradients, state.moments, trained
    )
    trained = {n: p - rate * factors[n] * updates[n] for n, p in trained.items()}
    parameters = {n: trained.get(n, p) for n, p in state.parameters.items()}
    return State(parameters, moments), metrics


@functools.partial(jax.jit, static_argnames=("frame", "recipe", "mesh"))
def evaluation_step(
    frame: Frame,
    recipe: Recipe,
    mesh: Mesh | None,
    parameters: Parameters,
    batch: Batch,
) -> tuple[Array, Array]:
    """Summed loss and predicted tokens of `[1, row, position]`."""

    def sums(parameters: Parameters, batch: Batch):
        part = jax.tree.map(lambda a: a[0], batch)
        total = loss_sums(frame, parameters, part, recipe)
        return tuple(total if mesh is None else lax.psum(total, mesh.axis_names))

    if mesh is not None:
        rows = PartitionSpec(None, mesh.axis_names)
        sums = jax.shard_map(
            sums,
            mesh=mesh,
            in_specs=(EVERYWHERE, rows),
            out_specs=EVERYWHERE,
            check_vma=False,
        )
    return sums(parameters, batch)


def put_back(model: Model, frame: Frame, parameters: Parameters) -> None:
    """Gives `model` these parameters, in place, in the dtypes it has."""
    old = jax.tree.leaves(nnx.split(model)[1])
    leaves = [
        jnp.asarray(np.asarray(parameters[name]), leaf.dtype)
        for name, leaf in zip(frame.names, old)
    ]
    nnx.update(model, jax.tree.unflatten(frame.structure, leaves))


def parameter_names(model: Model) -> list[str]:
    """The dotted names of the model's parameters."""
    return list(take_apart(model)[0].names)
