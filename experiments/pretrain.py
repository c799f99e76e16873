"""How far does training bring the loss of a decoder down, on text it has not seen?

    python -m experiments.pretrain --init=demo --steps=50

Default: the packaged `demo` goes on training on the verses of its held-out books, in
ten languages, for 50 steps of 1,024 tokens; every fortieth is kept for evaluation.

Expect: 5.23 nats a token on the kept verses before, 5.20 after. The cards of `demo` and
`demo-small` have the flags that trained them from their first weights.

Trains any decoder of `jaxling.models`: from a checkpoint (`--init`), or from random
weights (`--config`, a Hugging Face config.json). The text is a file with one document a
line (`--documents`), tokenised with the tokenizer of `--init`, or token files
(`--tokens`) made by `jaxling.training.write_tokens`, `.npy` files of ids, or files of
ids without a header (`--token_type`); several are joined in the workdir. The same
command resumes a run that was killed, at its newest snapshot. The workdir holds
metrics.jsonl (loss, gradient norm, learning rate of every step), loss.png, and model/,
which transformers opens; the tokenizer is in it too, but with `--config` and `--tokens`
alone, where none is known.

`--recipe=olmo` is OLMo-1B's (configs/official/OLMo-1B.yaml of allenai/OLMo v0.5.1:
AdamW 4e-4, betas .9 and .95, epsilon 1e-5, weight decay .1, warm-up 2,000, cosine to a
tenth at step 739,328, clipping at 1, 2,048 x 2,048 tokens a step, bfloat16 products),
entered at step 605,000 for 1,000 steps as the pivot-aware pre-training of He et al.,
2025, https://arxiv.org/abs/2505.16385, was; any other flag changes that one setting of
the recipe.
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
import transformers
from absl import flags

from jaxling import checkpoints, demo, models, tokenizer_files, training
from jaxling.report import plots, tables

from . import common

_RECIPES = {
    "demo": training.Recipe(steps=50, batch=8, learning_rate=5e-4, warmup_steps=5),
    "olmo": training.OLMO,
}
_INIT = flags.DEFINE_string(
    "init",
    None,
    "Weights and tokenizer to begin with: a name, directory, or hub id; if none, those"
    " of --model.",
)
_CONFIG = flags.DEFINE_string(
    "config", None, "A config.json: random weights instead of those of --init."
)
_TEXT = flags.DEFINE_string("documents", None, "UTF-8 text, one document a line.")
_TOKENS = flags.DEFINE_list("tokens", [], "Token files, instead of --documents.")
_EVALUATE_ON = flags.DEFINE_list(
    "evaluate_on", [], "Token files to evaluate on, not every fortieth document."
)
_EVALUATE_EVERY = flags.DEFINE_integer("evaluate_every", 25, "Steps; 0: at the end.")
SNAPSHOT_EVERY = flags.DEFINE_integer("snapshot_every", 25, "Steps.")
_DATA_PARALLEL = flags.DEFINE_bool(
    "data_parallel", False, "Share the rows of a step out over all devices."
)
_RECIPE = flags.DEFINE_enum(
    "recipe", "demo", list(_RECIPES), "Where settings are from."
)
_SETTINGS = {
    "steps": flags.DEFINE_integer("steps", None, "Steps of the optimiser."),
    "batch": flags.DEFINE_integer("rows", None, "Rows of a step, on all devices."),
    "length": flags.DEFINE_integer("length", None, "Tokens of a row."),
    "accumulate": flags.DEFINE_integer("accumulate", None, "Parts of a step."),
    "learning_rate": flags.DEFINE_float("learning_rate", None, "Its highest value."),
    "warmup_steps": flags.DEFINE_integer("warmup_steps", None, "Rising steps."),
    "schedule": flags.DEFINE_enum(
        "schedule", None, ["cosine", "linear", "constant"], "After the warm-up."
    ),
    "decay_steps": flags.DEFINE_integer("decay_steps", None, "End of the schedule."),
    "first_step": flags.DEFINE_integer("first_step", None, "Where to enter it."),
    "final_rate": flags.DEFINE_float("final_rate", None, "Share of the rate left."),
    "beta1": flags.DEFINE_float("beta1", None, "Of AdamW."),
    "beta2": flags.DEFINE_float("beta2", None, "Of AdamW."),
    "epsilon": flags.DEFINE_float("epsilon", None, "Of AdamW."),
    "weight_decay": flags.DEFINE_float("weight_decay", None, "Of AdamW."),
    "no_decay": flags.DEFINE_string("no_decay", None, "Names spared, a pattern."),
    "clip": flags.DEFINE_float("clip", None, "Largest norm of the gradient."),
    "dtype": flags.DEFINE_enum(
        "compute_dtype", None, ["float32", "bfloat16"], "Of the products."
    ),
    "document_mask": flags.DEFINE_bool(
        "document_mask", None, "Attention stays within a document."
    ),
}
_SHUFFLE = flags.DEFINE_bool(
    "shuffle", None, "A new order of documents each epoch, by --seed; or the file's."
)
_SAVE_DTYPE = flags.DEFINE_enum(
    "save_dtype", "float32", ["float32", "bfloat16"], "Of the exported weights."
)
_RATES = flags.DEFINE_list(
    "rates", [], "pattern=factor of the learning rate of parameters; 0 freezes."
)


def main(argv: list[str]) -> None:
    """Trains, evaluates before and after, draws the loss and exports the model."""
    del argv
    recipe = recipe_of_flags()
    start = _INIT.value or common.MODEL.value
    tokenizer_of = None
    # Tokens of a file for random weights may be anyone's; else they are the start's.
    if _INIT.value or not (_CONFIG.value and _TOKENS.value):
        tokenizer_of = checkpoints.locate(
            start, common.REVISION.value, tokenizer_files.FILES
        )
    if _CONFIG.value:
        try:
            config = json.loads(pathlib.Path(_CONFIG.value).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"--config={_CONFIG.value} is no JSON: {error}") from None
        model = models.build(config, jax.random.key(common.SEED.value))
        _check_tokenizer(tokenizer_of, model)
    else:
        model = models.load(start, revision=common.REVISION.value, dtype="float32")
    if _TOKENS.value and _TEXT.value:
        raise ValueError("Give --documents or --tokens, not both.")
    tokens, held_out = _opened(_TOKENS.value), _held_out()
    inputs = _inputs(model, start, tokenizer_of, [*tokens, *held_out.values()])
    run = common.begin("pretrain", inputs)
    if tokens:
        train_file = _joined(run.workdir, tokens, recipe)
    else:
        train_file, held_out = _tokenised(run.workdir, tokenizer_of, held_out)
    mesh = None
    if _DATA_PARALLEL.value:
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    before = {
        name: training.evaluate(model, file, recipe, mesh=mesh)
        for name, file in held_out.items()
    }
    outcome = training.train(
        model,
        train_file,
        recipe,
        workdir=run.workdir,
        evaluations=held_out,
        evaluate_every=_EVALUATE_EVERY.value,
        snapshot_every=SNAPSHOT_EVERY.value,
        mesh=mesh,
    )
    exported = run.workdir / "model"
    models.save(model, exported)
    if _SAVE_DTYPE.value != "float32":
        models.save(models.load(exported, dtype=_SAVE_DTYPE.value), exported)
    files = _export_tokenizer(tokenizer_of, exported)
    steps, losses = training.loss_curve(run.workdir)
    plots.save_curves(
        run.workdir / "loss.png",
        ["training"],
        [losses],
        x=steps,
        title=f"{outcome.step:,} steps of {recipe.batch * recipe.length:,} tokens",
        x_label="step",
        value_label="nats a token",
    )
    rows = [
        [name, before[name].loss, after.loss, after.perplexity, after.targets]
        for name, after in outcome.evaluations.items()
    ]
    print(
        tables.format_table(["text", "before", "after", "perplexity", "tokens"], rows)
    )
    print(
        f"\n{outcome.tokens_per_second:,.0f} tokens/s. Losses in {run.workdir}"
        f"/metrics.jsonl and loss.png; the model in {exported}"
        + (f", with {', '.join(files)}." if files else ", without a tokenizer.")
    )
    common.finish(
        run,
        {
            "steps": outcome.step,
            "training_loss": outcome.loss,
            "evaluations": {
                name: {"before": before[name].loss, **after._asdict()}
                for name, after in outcome.evaluations.items()
            },
        },
    )


def recipe_of_flags(**demo_settings: Any) -> training.Recipe:
    """The recipe of the flags; `demo_settings` are another script's for the demo.

    Raises:
      ValueError: a setting breaks its rule.
    """
    recipe = _RECIPES[_RECIPE.value]
    if _RECIPE.value == "demo":
        recipe = recipe._replace(**demo_settings)
    given: dict[str, Any] = {name: flag.value for name, flag in _SETTINGS.items()}
    recipe = recipe._replace(**{k: v for k, v in given.items() if v is not None})
    shuffle = recipe.seed is not None if _SHUFFLE.value is None else _SHUFFLE.value
    recipe = recipe._replace(seed=common.SEED.value if shuffle else None)
    rates = []
    for entry in _RATES.value:
        pattern, separator, factor = entry.rpartition("=")
        try:
            rates.append((pattern, float(factor)))
        except ValueError:
            separator = ""
        if not separator:
            raise ValueError(f"--rates must be pattern=factor,...; got {entry!r}.")
    if rates:
        recipe = recipe._replace(rates=tuple(rates))
    training.check_recipe(recipe)
    return recipe


def _open_tokenizer(folder: pathlib.Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )


def _check_tokenizer(folder: pathlib.Path | None, model: models.Model) -> None:
    """Raises ValueError where a config's vocabulary is too small for the tokenizer."""
    size = model.unembed_matrix.shape[0]
    if folder and len(_open_tokenizer(folder)) > size:
        raise ValueError(
            f"The tokenizer of {folder} has {len(_open_tokenizer(folder))} tokens; the"
            f" vocabulary of --config={_CONFIG.value} has {size}."
        )


def _export_tokenizer(folder: pathlib.Path | None, to: pathlib.Path) -> list[str]:
    """Puts the tokenizer beside the exported model; the names of its files."""
    if folder is None:
        return []
    if not _CONFIG.value:
        return tokenizer_files.copy(folder, to)
    # The config.json here is of another model, and names the class no longer.
    written = _open_tokenizer(folder).save_pretrained(to)
    return sorted({pathlib.Path(path).name for path in written})


def _opened(paths: list[str]) -> list[training.TokenFile]:
    """Token files; `--token_type` is of those that are files of ids alone."""
    return [training.open_tokens(path, common.TOKEN_TYPE.value) for path in paths]


def _held_out() -> dict[str, training.TokenFile]:
    """The files of `--evaluate_on`, by the last part of their paths if that tells."""
    names = [pathlib.Path(path).name for path in _EVALUATE_ON.value]
    if len(set(names)) < len(names):
        names = _EVALUATE_ON.value
    return dict(zip(names, _opened(_EVALUATE_ON.value)))


def _inputs(
    model: models.Model,
    start: str,
    tokenizer_of: pathlib.Path | None,
    files: list[training.TokenFile],
) -> dict[str, Any]:
    """What is read, by its digest: another of it in the same workdir is another run."""
    inputs: dict[str, Any] = {
        "model": model.config,
        "tokens": [file.fingerprint for file in files],
    }
    if not _CONFIG.value:
        opened = checkpoints.open_checkpoint(start, common.REVISION.value)
        digests = [(name, opened.digest(name)) for name in sorted(opened.tensor_names)]
        inputs["weights"] = hashlib.sha256(repr(digests).encode()).hexdigest()
    if tokenizer_of is not None:
        inputs["tokenizer"] = {
            name: _digest(tokenizer_of / name)
            for name in tokenizer_files.FILES
            if (tokenizer_of / name).is_file()
        }
    if _TEXT.value:
        inputs["documents"] = _digest(_TEXT.value)
    elif not _TOKENS.value:
        inputs["documents"] = "demo.verses, held_out"
    return inputs


def _digest(path: str | pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joined(
    workdir: pathlib.Path, files: list[training.TokenFile], recipe: training.Recipe
) -> training.TokenFile:
    """One file of all: itself where there is one, else a copy in the workdir."""
    if len(files) == 1:
        return files[0]
    path = workdir / "tokens"
    if path.exists():
        return training.open_tokens(path)
    return training.write_tokens(
        path,
        training.joined(files, recipe.length),
        vocabulary_size=max(file.largest for file in files) + 1,
    )


def _tokenised(
    workdir: pathlib.Path,
    tokenizer_of: pathlib.Path | None,
    held_out: dict[str, training.TokenFile],
) -> tuple[training.TokenFile, dict[str, training.TokenFile]]:
    """The text as a file to train on; where none is held out, part of it is kept."""
    paths = {"train": workdir / "tokens"}
    if not held_out:
        paths["held out"] = workdir / "held_out_tokens"
    if not all(path.exists() for path in paths.values()):
        assert tokenizer_of is not None, "text was given, or the demo's is read"
        tokenizer = _open_tokenizer(tokenizer_of)
        if _TEXT.value:
            texts = list(training.lines_of(_TEXT.value))
        else:
            verses = demo.verses("held_out").text.values()
            texts = [f" {verse}" for column in verses for verse in column if verse]
        parts = {"train": texts}
        if not held_out:
            if len(texts) < 2:
                raise ValueError(
                    f"{_TEXT.value} has {len(texts)} documents (a line each), and one"
                    " is kept for evaluation: give two or more, or --evaluate_on."
                )
            parts = {"train": texts, "held out": texts[::40]}
            del texts[::40]
        for name, path in paths.items():
            documents = training.tokenize(
                parts[name], tokenizer, end_token=tokenizer.eos_token_id
            )
            training.write_tokens(path, documents, vocabulary_size=len(tokenizer))
    files = {name: training.open_tokens(path) for name, path in paths.items()}
    train_file = files.pop("train")
    return train_file, held_out or files


if __name__ == "__main__":
    common.launch(main)
