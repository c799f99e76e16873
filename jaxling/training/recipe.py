"""What a training run does to the parameters: steps, rates, and the optimiser."""

import math
import numbers
import re
from typing import NamedTuple

import jax
import optax

Parameters = dict[str, jax.Array]


class Recipe(NamedTuple):
    """A run's settings. The defaults are a small model's; `OLMO` is OLMo-1B's.

    `batch` counts rows of a step over all devices and accumulated parts. Rates of
    parameter groups: `rates` pairs regular expressions with factors of the learning
    rate (0 freezes: no gradient is computed); the first that matches anywhere in a
    parameter's name counts. Weight decay spares names that match `no_decay`.
    """

    steps: int = 1000
    batch: int = 16
    length: int = 128
    accumulate: int = 1
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    schedule: str = "cosine"  # or "linear", "constant"
    decay_steps: int | None = None  # the schedule's end; `steps` where None
    first_step: int = 0  # where in the schedule the run begins
    final_rate: float = 0.1  # share of the learning rate left at the schedule's end
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    no_decay: str = r"norm|bias|embed"
    clip: float | None = 1.0
    rates: tuple[tuple[str, float], ...] = ()
    dtype: str = "float32"  # of the products; parameters and sums are float32
    document_mask: bool = True  # attention stays within a document
    seed: int | None = 0  # of the order of the documents; None: as in the file


# configs/official/OLMo-1B.yaml of allenai/OLMo v0.5.1, and where `semantic pivot`
# pre-training enters its schedule. The file leaves epsilon and what decays to the
# defaults of `OptimizerConfig` in olmo/config.py: 1e-5, neither norms, biases nor
# embeddings. (Its warm-up, long past at `first_step`, begins at a tenth of the rate.)
OLMO = Recipe(
    steps=1000,
    batch=2048,
    length=2048,
    learning_rate=4e-4,
    warmup_steps=2000,
    decay_steps=739_328,
    first_step=605_000,
    epsilon=1e-5,
    weight_decay=0.1,
    dtype="bfloat16",
    document_mask=False,
    seed=None,
)


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"`{name}` must be a whole number; got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}; got {value}.")


def check_recipe(recipe: Recipe) -> None:
    """Raises ValueError naming the setting, its rule and its value."""
    for name in ("steps", "batch", "length", "accumulate"):
        _check_whole(name, getattr(recipe, name), 1)
    if recipe.length < 2:
        raise ValueError("`length` must be at least 2: a token is predicted from one.")
    for name in ("warmup_steps", "first_step", "decay_steps", "seed"):
        value = getattr(recipe, name)
        if value is not None or name in ("warmup_steps", "first_step"):
            _check_whole(name, value, 0)
    if not recipe.weight_decay >= 0 or not math.isfinite(recipe.weight_decay):
        raise ValueError(
            f"`weight_decay` must not be negative; got {recipe.weight_decay}."
        )
    for name in ("learning_rate", "epsilon"):
        value = getattr(recipe, name)
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"`{name}` must be above 0; got {value}.")
    for name in ("beta1", "beta2"):
        value = getattr(recipe, name)
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` must be in [0, 1); got {value}.")
    if not 0 <= recipe.final_rate <= 1:
        raise ValueError(f"`final_rate` must be in [0, 1]; got {recipe.final_rate}.")
    if recipe.clip is not None and not recipe.clip > 0:
        raise ValueError(f"`clip` must be above 0, or None; got {recipe.clip}.")
    if recipe.schedule not in ("cosine", "linear", "constant"):
        raise ValueError(
            f"`schedule` must be cosine, linear or constant; got {recipe.schedule!r}."
        )
    if recipe.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"`dtype` must be float32 or bfloat16; got {recipe.dtype!r}.")
    if recipe.batch % recipe.accumulate:
        raise ValueError(
            f"`batch` must be a multiple of `accumulate`; got {recipe.batch} and"
            f" {recipe.accumulate}."
        )
    for pattern in (*(pattern for pattern, _ in recipe.rates), recipe.no_decay):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is no regular expression: {error}."
            ) from None
    for pattern, rate in recipe.rates:
        if not rate >= 0 or not math.isfinite(rate):
            raise ValueError(f"The rate of {pattern!r} must be >= 0; got {rate}.")


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of the run's step `step`, counted from 0.

    Warm-up rises linearly to the full rate, which step `warmup_steps - 1` has. From
    there on, with `p` the share of the schedule that has passed and `f` = `final_rate`,

        cosine: f + (1 - f) (1 + cos(pi p)) / 2;  linear: 1 - (1 - f) p;  constant: 1

    times the learning rate; `p` stays 1 after the end.
    """
    step = recipe.first_step + step
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    end = recipe.first_step + recipe.steps
    if recipe.decay_steps is not None:
        end = recipe.decay_steps
    passed = min(1.0, (step - recipe.warmup_steps) / max(1, end - recipe.warmup_steps))
    share = {
        "cosine": (1 + math.cos(math.pi * passed)) / 2,
        "linear": 1 - passed,
        "constant": 1.0,
    }[recipe.schedule]
    left = 1.0 if recipe.schedule == "constant" else recipe.final_rate
    return recipe.learning_rate * (left + (1 - left) * share)


def rate_factors(recipe: Recipe, names: list[str]) -> dict[str, float]:
    """The factor of the learning rate of each parameter.

    Raises:
      ValueError: a pattern of `rates` decides for no parameter, or all are frozen.
    """
    factors, used = {}, set()
    for name in names:
        factors[name] = 1.0
        for pattern, rate in recipe.rates:
            if re.search(pattern, name):
                factors[name] = rate
                used.add(pattern)
                break
    for pattern, _ in recipe.rates:
        if pattern not in used:
            matched = [name for name in names if re.search(pattern, name)]
            if matched:
                raise ValueError(
                    f"The rate of {pattern!r} is for no parameter: a pattern before it"
                    f" decides for all that it matches ({', '.join(sorted(matched))})."
                    " Put it first, or leave it out."
                )
            raise ValueError(
                f"The rate of {pattern!r} is for no parameter; there are"
                f" {', '.join(sorted(names))}."
            )
    if not any(factors.values()):
        raise ValueError("`rates` freezes every parameter: nothing is left to train.")
    return factors


def optimizer(recipe: Recipe, names: list[str]) -> optax.GradientTransformation:
    """AdamW for a dictionary of named parameters, without the learning rate.

    The caller multiplies the update by minus the learning rate of the step and the
    parameter's rate factor.
    """
    decayed = {name: not re.search(recipe.no_decay, name) for name in names}
    parts = [
        optax.scale_by_adam(b1=recipe.beta1, b2=recipe.beta2, eps=recipe.epsilon),
        optax.add_decayed_weights(recipe.weight_decay, mask=decayed),
    ]
    if recipe.clip is not None:
        parts.insert(0, optax.clip_by_global_norm(recipe.clip))
    return optax.chain(*parts)
