"""The training loop: batches in, parameters out, and a trail that can be resumed."""

import contextlib
import json
import math
import os
import pathlib
import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxling.models import Model
from jaxling.models.decoder import Decoder

from . import packing, snapshots, steps
from . import recipe as recipes
from .packing import Position, TokenFile
from .recipe import Recipe
from .snapshots import Snapshots


class Diverged(ValueError):
    """The loss, its gradient or a parameter is no number any more."""


class Evaluation(NamedTuple):
    """Mean loss in nats over `targets` predicted tokens."""

    loss: float
    targets: int

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that overflows."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)


class Outcome(NamedTuple):
    """Where a run ended; the losses by step are in its `metrics.jsonl`."""

    step: int
    loss: float
    evaluations: dict[str, Evaluation]
    snapshot: pathlib.Path | None
    tokens_per_second: float


def check(
    model: Model, files: Mapping[str, TokenFile], recipe: Recipe, mesh: Mesh | None
) -> None:
    """Raises ValueError where model, data, recipe and devices do not fit together."""
    recipes.check_recipe(recipe)
    if not isinstance(model, Decoder):
        raise ValueError(
            "Next tokens are predicted by decoders; the model is an"
            f" {type(model).__name__}, which sees what it would have to predict."
        )
    vocabulary = model.unembed_matrix.shape[0]
    for file in files.values():
        if file.largest >= vocabulary:
            raise ValueError(
                f"{file.path} holds token {file.largest}; the model's vocabulary ends"
                f" at {vocabulary - 1}. Was it written with another tokenizer?"
            )
    limit = getattr(model.spec, "length", None)
    if limit is not None and recipe.length > limit:
        raise ValueError(
            f"`length` {recipe.length} is longer than the {limit} positions that the"
            " model is configured for."
        )
    devices = 1 if mesh is None else mesh.size
    if recipe.batch % (recipe.accumulate * devices):
        raise ValueError(
            f"`batch` must be a multiple of `accumulate` x devices ="
            f" {recipe.accumulate} x {devices}; got {recipe.batch}."
        )


def evaluate(
    model: Model, file: TokenFile, recipe: Recipe, *, mesh: Mesh | None = None
) -> Evaluation:
    """The model's loss on a token file, every document once.

    `batch / accumulate` rows are run at a time.

    Raises:
      ValueError: model, data and recipe do not fit together, or the file is damaged.
    """
    check(model, {"evaluation": file}, recipe, mesh)
    packing.verify_tokens(file)
    frame, parameters = steps.take_apart(model)
    return _evaluate(frame, steps.place(parameters, mesh), file, recipe, mesh)


def _evaluate(frame, parameters, file, recipe, mesh) -> Evaluation:
    plain = recipe._replace(accumulate=1, rates=())
    loss, targets = 0.0, 0
    rows = recipe.batch // recipe.accumulate
    for batch in packing.evaluation_batches(file, rows=rows, length=recipe.length):
        placed = steps.place_batch(batch, 1, mesh)
        part, count = steps.evaluation_step(frame, plain, mesh, parameters, placed)
        loss, targets = loss + float(part), targets + int(count)
    if not targets:
        raise _nothing_to_predict(file)
    return Evaluation(loss / targets, targets)


def _nothing_to_predict(file: TokenFile) -> ValueError:
    return ValueError(
        f"{file.path} holds no token to predict: every document is one token, or none"
        " counts."
    )


def train(
    model: Model,
    file: TokenFile,
    recipe: Recipe,
    *,
    workdir: str | os.PathLike,
    evaluations: Mapping[str, TokenFile] | None = None,
    evaluate_every: int | None = None,
    snapshot_every: int = 200,
    keep: int = 3,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Outcome:
    """Trains `model` in place on a token file; goes on where a killed run stopped.

    A step reads `recipe.batch` rows, sums the loss over their predicted tokens in
    float32, and moves the parameters by AdamW. Under `workdir` it keeps

        metrics.jsonl  one line a step: step (from 1), loss (nats per predicted token),
                       gradient_norm, learning_rate, targets, epoch, seconds; and one
                       line an evaluation: step, evaluation, loss, perplexity, targets
        snapshots/     parameters, moments and place in the data, the newest `keep`

    The same call on the same `workdir` resumes from the newest snapshot, and on the
    same device it gives the same losses to the last bit as a run that was never
    interrupted: the order of the documents follows from (seed, epoch), and nothing
    else is random. A snapshot is kept only when the step after it had a finite loss;
    the last, when its parameters and its evaluations are finite. Token files are
    verified when a run begins, not when it is resumed.

    Args:
      model: a decoder of `jaxling.models`; float32 parameters are what is trained, and
        it holds the result afterwards.
      file: what to train on (`open_tokens`, `write_tokens`).
      recipe: the settings of the run.
      workdir: one run's directory.
      evaluations: token files by name, evaluated every `evaluate_every` steps (where
        given) and at the end.
      snapshot_every: steps between snapshots; there is one at the end too.
      keep: how many snapshots are kept, at least 2.
      mesh: the rows of a step are shared out over all its devices.
      progress: show a bar with loss, tokens per second and time left.

    Raises:
      ValueError: the arguments do not fit together, `workdir` holds another run (other
        settings, tokens, model or first parameters), all of its snapshots are damaged,
        or a token file is, or has nothing to predict.
      Diverged: a loss, of a step or an evaluation, or a parameter after the last step
        is not finite; the message names the last good snapshot.
    """
    files = dict(evaluations or {})
    check(model, {"": file, **files}, recipe, mesh)
    for name, every in (
        ("snapshot_every", snapshot_every),
        ("evaluate_every", evaluate_every or 1),
    ):
        if every < 1:
            raise ValueError(f"`{name}` must be at least 1; got {every}.")
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    frame, parameters = steps.take_apart(model)
    recipes.rate_factors(recipe, list(parameters))
    state = steps.initial_state(recipe, parameters)
    identity = {
        "recipe": recipe._asdict(),
        "tokens": file.fingerprint,
        "config": model.config,
        "parameters": _checksum(parameters),
    }
    identity = json.loads(json.dumps(identity, default=str))
    saved = Snapshots(workdir / "snapshots", keep=keep)
    try:
        done, position = 0, packing.BEGINNING
        found = saved.restore()
        if found is None:
            for each in (file, *files.values()):
                packing.verify_tokens(each)
                if not packing.predicted(each, recipe.length):
                    raise _nothing_to_predict(each)
        else:
            _check_identity(workdir, found.record["identity"], identity)
            state = snapshots.like(state, found.arrays)
            done, position = found.step, Position(*found.record["position"])
        state = steps.place(state, mesh)
        batches = packing.training_batches(
            file,
            rows=recipe.batch,
            length=recipe.length,
            seed=recipe.seed,
            position=position,
        )

        def measure(parameters: recipes.Parameters) -> dict[str, Evaluation]:
            return {
                name: _evaluate(frame, parameters, held_out, recipe, mesh)
                for name, held_out in files.items()
            }

        with contextlib.closing(
            _Trail(workdir / "metrics.jsonl", done, recipe, progress)
        ) as trail:
            run = _Run(saved, trail, identity)
            if found is not None:
                run.loss = found.record["loss"]
            step = done
            for step in range(done + 1, recipe.steps + 1):
                batch, position = next(batches)
                rate = recipes.learning_rate(recipe, step - 1)
                state, metrics = steps.train_step(
                    frame,
                    recipe,
                    mesh,
                    state,
                    steps.place_batch(batch, recipe.accumulate, mesh),
                    np.float32(rate),
                )
                # Of the step before: this one runs while that one is written down.
                run.settle()
                run.pending = step, metrics, rate, position
                last = step == recipe.steps
                if last or step % snapshot_every == 0:
                    run.settle()
                    run.held = step, snapshots.copied(state), position, run.loss
                if last or (evaluate_every and step % evaluate_every == 0):
                    run.settle()
                    if last:
                        run.judge_parameters(step, state.parameters)
                    measured = measure(state.parameters)
                    run.judge_evaluations(step, measured)
                    trail.evaluated(step, measured)
            if done == recipe.steps:
                measured = measure(state.parameters)
                run.judge_evaluations(step, measured)
            run.keep()
            steps.put_back(model, frame, state.parameters)
            rate = trail.tokens_per_second()
            return Outcome(step, run.loss, measured, saved.newest(), rate)
    finally:
        saved.close()


class _Run:
    """What a step leaves to the next: its loss, and a snapshot that waits for proof."""

    def __init__(self, saved: Snapshots, trail: "_Trail", identity: dict[str, Any]):
        self.saved, self.trail, self.identity = saved, trail, identity
        self.pending: tuple[int, steps.Metrics, float, Position] | None = None
        self.held: tuple[int, Any, Position, float] | None = None
        self.loss = math.nan

    def settle(self) -> None:
        """Waits for the pending step, writes its line, and judges it."""
        if self.pending is None:
            return
        (step, metrics, rate, position), self.pending = self.pending, None
        self.loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        finite = math.isfinite(self.loss) and math.isfinite(norm)
        self.trail.stepped(
            step,
            {
                "loss": self.loss if finite else None,
                "gradient_norm": norm if finite else None,
                "learning_rate": rate,
                "targets": int(metrics.targets),
                "epoch": position.epoch,
            },
        )
        if not finite:
            raise self._diverged(
                f"The loss of step {step} is {self.loss} with gradient norm {norm} at"
                f" learning rate {rate:.3g}",
                f" of that step (epoch {position.epoch}, rows before {position.row})",
            )
        self.keep()

    def judge_parameters(self, step: int, parameters: recipes.Parameters) -> None:
        """Raises Diverged where the last step, which no loss follows, ruined them."""
        for name, values in parameters.items():
            if not bool(jnp.isfinite(values).all()):
                raise self._diverged(f"Step {step} left {name} not finite")

    def judge_evaluations(self, step: int, measured: dict[str, Evaluation]) -> None:
        """Raises Diverged where the loss on a held-out file is no number."""
        for name, found in measured.items():
            if not math.isfinite(found.loss):
                raise self._diverged(
                    f"After step {step} the loss on {name!r} is {found.loss}"
                )

    def _diverged(self, what: str, data: str = "") -> Diverged:
        good = self.saved.newest()
        where = "there is no snapshot yet" if good is None else f"{good} is good"
        return Diverged(
            f"{what}; the run has stopped, {where}. Lower the learning rate, warm up"
            f" for longer, or look at the data{data}."
        )

    def keep(self) -> None:
        """Saves the snapshot that waited."""
        if self.held is not None:
            step, state, position, loss = self.held
            record = {
                "identity": self.identity,
                "position": list(position),
                "loss": loss,
            }
            self.saved.save(step, state, record)
            self.held = None


def loss_curve(workdir: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of a run, from its `metrics.jsonl`; NaN where it diverged."""
    with open(pathlib.Path(workdir) / "metrics.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    found = [(r["step"], r["loss"]) for r in lines if "evaluation" not in r]
    steps_, losses = zip(*found) if found else ((), ())
    return np.array(steps_, int), np.array(losses, float)


def _check_identity(
    workdir: pathlib.Path, before: dict[str, Any], now: dict[str, Any]
) -> None:
    old, new = (
        {
            **run["recipe"],
            "tokens": run["tokens"],
            **{f"config.{name}": v for name, v in run.get("config", {}).items()},
            "first parameters": run.get("parameters"),
        }
        for run in (before, now)
    )
    differences = [
        f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise ValueError(
            f"{workdir} holds another run: {', '.join(differences)}. Choose another"
            " directory, or remove that one."
        )


def _checksum(parameters: recipes.Parameters) -> str:
    """CRC-32 of the names and values."""
    checksum = 0
    for name in sorted(parameters):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(np.asarray(parameters[name]).tobytes(), checksum)
    return f"{checksum:08x}"


class _Trail:
    """What a person sees of a run: the lines of metrics.jsonl and the bar."""

    def __init__(self, path: pathlib.Path, step: int, recipe: Recipe, progress: bool):
        kept = []
        if path.exists():
            for line in path.read_text("utf-8").splitlines(keepends=True):
                # A killed run can leave lines of steps that are done again, the last
                # of them cut.
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept), "utf-8")
        os.replace(partial, path)
        self._file = open(path, "a", encoding="utf-8")
        tokens = recipe.batch * recipe.length
        self._tokens, self._begin, self._first = tokens, time.perf_counter(), step
        self._timed, self._last = (self._begin, step), step
        self._bar = tqdm(
            total=recipe.steps * tokens,
            initial=step * tokens,
            unit=" tokens",
            unit_scale=True,
            disable=not progress,
        )

    def stepped(self, step: int, values: dict[str, Any]) -> None:
        """The line of a step."""
        if step == self._first + 2:
            # The first step compiled, the second waited for it.
            self._timed = time.perf_counter(), step
        self._last = step
        self._write({"step": step, **values})
        loss = values["loss"]
        self._bar.set_postfix(
            step=step, loss="none" if loss is None else f"{loss:.3f}", refresh=False
        )
        self._bar.update(self._tokens)

    def evaluated(self, step: int, measured: dict[str, Evaluation]) -> None:
        """The lines of an evaluation."""
        for name, found in measured.items():
            line = {"step": step, "evaluation": name, **found._asdict()}
            self._write({**line, "perplexity": found.perplexity})
            if not self._bar.disable:
                self._bar.write(f"step {step}  {name}  loss {found.loss:.4f}")

    def _write(self, line: dict[str, Any]) -> None:
        line["seconds"] = round(time.perf_counter() - self._begin, 3)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def tokens_per_second(self) -> float:
        """Of this process's steps, evaluations included, compilation not."""
        begin, step = self._timed
        seconds = time.perf_counter() - begin
        return (self._last - step) * self._tokens / seconds if seconds > 0 else 0.0

    def close(self) -> None:
        """Ends the bar and the file."""
        self._bar.close()
        self._file.close()
