"""Lenses: what each layer would say, read through the model's own unembedding.

`LogitLens` reads the residual stream as it is (nostalgebraist, "interpreting GPT: the
logit lens", 2020); `TunedLens` first moves every layer's stream towards the last one's
by a learned affine map (Belrose et al., 2023, https://arxiv.org/abs/2303.08112):

    translator_l(h) = h + W_l h + b_l,  the last layer's is the identity

Decoders are read after any block, masked language models through their head, and
encoder-decoders in either stack. An encoder stack was never trained to be read through
the vocabulary: its `reading` says so, and pictures carry it.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from jaxling import kernels, models


class LogitLens(NamedTuple):
    """The residual stream of a model's stack, read as it is.

    `stack` is "" for a model of one stack, "encoder." or "decoder." otherwise.
    """

    model: models.Model
    stack: str = ""

    @property
    def reading(self) -> str:
        """What a picture should call this reading."""
        if self.stack == "encoder.":
            return "logit lens of the encoder, through the shared embedding"
        return "logit lens"

    def transform(self) -> Partial:
        """`[layer, n, d] -> [layer, n, d]`: what the unembedding is multiplied with."""
        graph, parameters = nnx.split(self.model)
        read = _encoder_normed if self.stack == "encoder." else _normed
        return Partial(read, graph, parameters)


class TunedLens(NamedTuple):
    """A `LogitLens` behind one affine translator per layer but the last."""

    model: models.Model
    weights: Array
    """`[layer - 1, d, d]`: `hidden @ weights` is added to the stream."""
    biases: Array
    """`[layer - 1, d]`."""
    stack: str = ""

    @property
    def reading(self) -> str:
        """What a picture should call this reading."""
        return LogitLens(self.model, self.stack).reading.replace("logit", "tuned")

    def transform(self) -> Partial:
        """`[layer, n, d] -> [layer, n, d]`: what the unembedding is multiplied with."""
        read = LogitLens(self.model, self.stack).transform()
        return Partial(_translated, read, self.weights, self.biases)


def _normed(graph, parameters, hidden):
    return nnx.merge(graph, parameters).final_norm(hidden)


def _encoder_normed(graph, parameters, hidden):
    norm = nnx.merge(graph, parameters).encoder.final_norm
    return hidden if norm is None else norm(hidden)


def _translated(read, weights, biases, hidden):
    moved = jnp.einsum("lnd,lde->lne", hidden[:-1], weights, precision="highest")
    moved = hidden[:-1] + moved + biases[:, None]
    return read(jnp.concatenate([moved.astype(hidden.dtype), hidden[-1:]]))


def project(
    lens: LogitLens | TunedLens, hidden: ArrayLike, **reductions: Any
) -> kernels.Projection:
    """What every layer says at every place, reduced over the vocabulary.

    Args:
      lens: how to read.
      hidden: block outputs `[layer, ..., d]`, as `cache["resid_post"]`.
      reductions: as in `jaxling.kernels.project_layers`; `targets` has the shape of
        the places, with an axis of targets behind it or without.

    Returns:
      A `Projection` whose arrays are `[layer, ...]`, then their own axes.
    """
    hidden = jnp.asarray(hidden)
    places = hidden.shape[1:-1]
    model = lens.model
    # The encoder is read through the embedding that both stacks share: what it puts in,
    # without what the decoder's unembedding adds.
    encoder = lens.stack == "encoder."
    matrix = model.embedding[...] if encoder else model.unembed_matrix
    if reductions.get("targets") is not None:
        targets = np.asarray(reductions["targets"])
        reductions["targets"] = targets.reshape(
            int(np.prod(places)), *targets.shape[len(places) :]
        )
    found = kernels.project_layers(
        hidden.reshape(len(hidden), -1, hidden.shape[-1]),
        matrix,
        transform=lens.transform(),
        bias=None if encoder else model.unembed_bias,
        softcap=model.logit_softcap,
        **reductions,
    )
    return jax.tree.map(lambda x: x.reshape(len(x), *places, *x.shape[2:]), found)


def trajectory(
    lens: LogitLens | TunedLens,
    tokens: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    **reductions: Any,
) -> kernels.Projection:
    """Runs the model on `[batch, position]` tokens and projects every block's output.

    `inputs` are the model's further arguments (`decoder_tokens`).
    """
    name = lens.stack + "resid_post"
    _, cache = lens.model.run_with_cache(
        tokens, attention_mask, names_filter=(name,), **(inputs or {})
    )
    return project(lens, cache[name], **reductions)


class Batch(NamedTuple):
    """What a model reads in one step of training."""

    tokens: np.ndarray
    """`[batch, position]`."""
    mask: np.ndarray
    """`[batch, position]`, zero at padding."""
    inputs: Mapping[str, np.ndarray] | None = None
    """`decoder_tokens` and `decoder_attention_mask` of an encoder-decoder."""


class Training(NamedTuple):
    """A trained lens, and its loss at each step: mean KL in nats over the layers."""

    lens: TunedLens
    losses: np.ndarray


def train_tuned_lens(
    model: models.Model,
    batches: Iterable[Batch | tuple[np.ndarray, np.ndarray]],
    *,
    learning_rate: float = 1e-3,
    stack: str = "",
    tile: int = 4096,
) -> Training:
    """Fits the translators so that every layer predicts what the last one predicts.

    Minimises the mean over layers and real positions of KL(last layer || layer) with
    Adam; the model is fixed. One step per batch.

    Args:
      model: any model with a vocabulary.
      batches: `Batch`es, or pairs of tokens and mask, of one shape (a second shape
        compiles a second program).
      learning_rate: of Adam.
      stack: as in `LogitLens`.
      tile: tokens of the vocabulary per step of the kernel.

    Raises:
      ValueError: a model of one block, which has nothing to translate; no batch; a loss
        that is not a number.
    """
    name = stack + "resid_post"
    graph, parameters = nnx.split(model)
    options = graph, learning_rate, stack, tile
    translators, losses = None, []
    for batch in batches:
        tokens, mask, inputs = Batch(*batch)
        further: dict[str, Any] = dict(inputs or {})
        _, cache = model.run_with_cache(tokens, mask, names_filter=(name,), **further)
        if stack == "decoder.":
            said = further["decoder_tokens"]
            mask = further.get("decoder_attention_mask", np.ones(np.shape(said)))
        hidden = cache[name].astype(jnp.float32)
        if translators is None:
            depth, d = hidden.shape[0] - 1, hidden.shape[-1]
            if depth < 1:
                raise ValueError("A model of one block has no layer to translate.")
            translators = jnp.zeros((depth, d, d)), jnp.zeros((depth, d))
            state = optax.adam(learning_rate).init(translators)
        translators, state, value = _step(
            *(translators, state, parameters, hidden, jnp.asarray(mask, bool)), *options
        )
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise ValueError(
                f"The loss of step {len(losses)} is {losses[-1]}: the model's hidden"
                " states or its unembedding are not numbers, or the mask is empty."
            )
    if translators is None:
        raise ValueError("`batches` must hold at least one batch.")
    return Training(TunedLens(model, *translators, stack), np.array(losses))


# The model's parameters are an argument: a program holds a copy of what it closes over,
# and programs of gigabytes cannot be compiled.
@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _step(translators, state, parameters, hidden, mask, graph, rate, stack, tile):
    """One step of Adam on the translators, and the loss before it."""

    def loss(translators):
        lens = TunedLens(nnx.merge(graph, parameters), *translators, stack)
        found = project(lens, hidden, divergence=True, tile=tile)
        kl = jnp.where(mask, found.kl_to_final[:-1], 0.0)
        return kl.sum() / (mask.sum() * len(kl))

    value, gradient = jax.value_and_grad(loss)(translators)
    updates, state = optax.adam(rate).update(gradient, state)
    return optax.apply_updates(translators, updates), state, value


def training_batches(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    steps: int,
    batch: int = 8,
    length: int = 128,
    seed: int = 0,
    begin: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """`steps` batches for `train_tuned_lens`.

    Texts are drawn with replacement, cut at `length` tokens and padded to it; empty
    ones are left out. With `begin`, the tokens that a decoder begins with, batches are
    for an encoder-decoder: of a text with a tab the encoder reads what is before it and
    the decoder what is behind, any other text is read by both.

    Raises:
      ValueError: no text has a token.
    """
    pair = begin is not None
    sides = [text.partition("\t") if pair else (text, "", "") for text in texts if text]
    coded = tokenizer.encode_batch([before for before, _, _ in sides])
    columns = [[found.ids[:length] for found in coded]]
    if begin is not None:
        said = [behind if tab else before for before, tab, behind in sides]
        coded = tokenizer.encode_batch(said, add_special_tokens=False)
        columns.append([[*begin, *found.ids][:length] for found in coded])
    known = [row for row in zip(*columns) if all(row)]
    if not known:
        raise ValueError("The text to train a lens on holds no token.")
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = [known[i] for i in rng.integers(len(known), size=batch)]
        (tokens, mask), *behind = (_padded(column, length) for column in zip(*chosen))
        names = "decoder_tokens", "decoder_attention_mask"
        yield Batch(tokens, mask, dict(zip(names, behind[0])) if behind else None)


def _padded(
    rows: Sequence[Sequence[int]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, own in enumerate(rows):
        tokens[row, : len(own)] = own
        mask[row, : len(own)] = True
    return tokens, mask


def unembedding_hash(model: models.Model) -> str:
    """SHA-256 of the unembedding's shape, dtype and bytes: which model a lens is of."""
    matrix = np.asarray(model.unembed_matrix)
    digest = hashlib.sha256(f"{matrix.shape} {matrix.dtype}".encode())
    for start in range(0, len(matrix), 4096):
        digest.update(np.ascontiguousarray(matrix[start : start + 4096]).tobytes())
    return digest.hexdigest()


def save_lens(lens: TunedLens, directory: str | os.PathLike) -> None:
    """Writes the translators with Orbax, and the hash of the unembedding beside them.

    Raises:
      ValueError: the directory exists already.
    """
    path = pathlib.Path(directory).resolve()
    if path.exists():
        raise ValueError(f"{path} exists already; choose another directory.")
    digest = np.frombuffer(bytes.fromhex(unembedding_hash(lens.model)), np.uint8)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            path,
            {
                "weights": lens.weights,
                "biases": lens.biases,
                "unembedding": digest,
                "stack": np.frombuffer(lens.stack.encode() or b"-", np.uint8),
            },
        )


def load_lens(model: models.Model, directory: str | os.PathLike) -> TunedLens:
    """Reads a lens that `save_lens` wrote for this very model.

    Raises:
      ValueError: no lens is there, or it belongs to another unembedding.
    """
    path = pathlib.Path(directory).resolve()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(path)
        digest = bytes(np.asarray(saved["unembedding"])).hex()
        stack = bytes(np.asarray(saved["stack"])).decode().replace("-", "")
        weights, biases = jnp.asarray(saved["weights"]), jnp.asarray(saved["biases"])
        if weights.ndim != 3 or biases.shape != weights.shape[:2]:
            raise ValueError(f"shapes {weights.shape} and {biases.shape}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no tuned lens: {error}") from None
    own = unembedding_hash(model)
    if digest != own:
        raise ValueError(
            f"The lens in {path} was trained for another model: its unembedding has"
            f" SHA-256 {digest[:12]}..., this model's {own[:12]}...."
        )
    return TunedLens(model, weights, biases, stack)


class TokenGroups(NamedTuple):
    """Sets of tokens for `groups=`, each bounded from both sides.

    Row g of `weights` holds the tokens of `names[g]` alone, row `len(names) + g` all
    of its tokens, shared ones too.
    """

    names: list[str]
    weights: np.ndarray


def token_groups(sets: Mapping[str, Collection[int]], vocabulary: int) -> TokenGroups:
    """Groups whose mass does not claim what other groups may have a right to.

    A token that several sets hold (a digit, a name, a first syllable that words of two
    languages begin with) is counted for none of them in the lower bound and for each
    of them in the upper one. A probability on the first token of a word is likewise
    only an upper bound on that word, which any other continuation shares.

    Args:
      sets: token ids of each language, writing system or word.
      vocabulary: size of the vocabulary.

    Returns:
      Weights `[2 g, vocab]`, float32; see `mass_bounds`.

    Raises:
      ValueError: a token id out of range.
    """
    names = list(sets)
    held = np.zeros((len(names), vocabulary), np.float32)
    for row, name in enumerate(names):
        ids = np.fromiter(sets[name], np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
            raise ValueError(f"Tokens of {name} must be in [0, {vocabulary}).")
        held[row, ids] = 1
    alone = held * (held.sum(0) == 1)
    return TokenGroups(names, np.concatenate([alone, held]))


class MassBounds(NamedTuple):
    """Probability of each group, `[..., g]`: on tokens of no other group, and on all.

    Both are relative to the sets that were given: a token that a language lacks only
    because its list of words is short counts as the others'.
    """

    lower: np.ndarray
    upper: np.ndarray


def mass_bounds(groups: TokenGroups, group_mass: ArrayLike) -> MassBounds:
    """Splits a `Projection`'s `group_mass` `[..., 2 g]` made with these groups."""
    mass = np.asarray(group_mass)
    size = len(groups.names)
    return MassBounds(mass[..., :size], mass[..., size:])
