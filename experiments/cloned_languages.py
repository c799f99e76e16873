"""Do a language and its clone end up alike, where every translation is known?

    python -m experiments.cloned_languages --clone_share=0.1

Default: a Llama of 4 layers, 64 dimensions and 0.3M parameters, trained for 1,200 steps
on the King James text and its clone (500 words each), then its neighbours, maps, layers
and lens against the truth.

Expect: about 1% of the words have their clone as nearest embedding and 84 to 88% after
an orthogonal map fitted on the other words (chance 0.2%): two alike spaces that do not
lie on each other. The lens names the translation at 26% of the places in the last layer
and at under 3% in the first. (The ranges are of several runs of the same seed; what
made them differ was not looked into.)

Schäfer et al., 2024, https://arxiv.org/abs/2404.07982: clones of a balanced corpus
share little, and a rarer clone is served by the commoner language's circuits. Every
word of the clone is new (id + V), while grammar and statistics are the same. Here a
quarter of the documents are also a verse and its clone, without which the lens has
nothing to translate; `--parallel_share=0` is the paper's setting. Measured on the first
64 verses of the held-out books.
"""

import jax
import numpy as np
from absl import flags

from jaxling import cloned_languages, demo, models, training
from jaxling.demo import text
from jaxling.report import plots, tables

from . import common

_WORDS = flags.DEFINE_integer("clone_words", 500, "Words of the language.")
_STEPS = flags.DEFINE_integer("clone_steps", 1200, "Training steps of the tiny model.")
_SHARE = flags.DEFINE_float("clone_share", 0.5, "Share of the clone among documents.")
_PARALLEL = flags.DEFINE_float(
    "parallel_share", 0.25, "Share of documents that are a sentence and its clone."
)
_LONGEST = 24  # words of a sentence
_SENTENCES = 64


def main(argv: list[str]) -> None:
    """Trains on a corpus and its clone, measures, writes a table and a picture."""
    del argv
    common.refuse(
        ("model", "revision", "tensor"), "a tiny model of the clones is trained."
    )
    size, seed = _WORDS.value, common.SEED.value
    for flag in (_SHARE, _PARALLEL):
        if not 0 <= flag.value <= 1:
            raise ValueError(f"--{flag.name} must be in [0, 1]; got {flag.value}.")
    if size < 2 or _STEPS.value < 1:
        raise ValueError(
            "--clone_words must be at least 2 and --clone_steps at least 1; got"
            f" {size} and {_STEPS.value}."
        )
    run = common.begin("cloned_languages", {"text": "demo.verses, eng"})
    sentences = {
        split: [
            [word.lower() for word in text.words(verse)[:_LONGEST]]
            for verse in demo.verses(split).text["eng"]
            if verse
        ]
        for split in ("train", "held_out")
    }
    distinct = {word for part in sentences.values() for line in part for word in line}
    if size > len(distinct):
        raise ValueError(
            f"--clone_words must be at most {len(distinct)}, the words of the text; got"
            f" {size}."
        )
    numbered = cloned_languages.number_words(
        sentences["train"] + sentences["held_out"], size
    )
    seen = numbered[: len(sentences["train"])]
    unseen = numbered[len(sentences["train"]) :][:_SENTENCES]
    vocabulary = cloned_languages.SPECIAL + 2 * size
    recipe = training.Recipe(
        steps=_STEPS.value, batch=16, length=2 * _LONGEST + 2, seed=None
    )
    drawn = cloned_languages.documents(
        seen,
        size,
        clone_share=_SHARE.value,
        parallel_share=_PARALLEL.value,
        seed=seed,
    )
    # A row holds at least one document.
    needed = (next(drawn) for _ in range(recipe.steps * recipe.batch))
    file = training.write_tokens(
        run.workdir / "tokens", needed, vocabulary_size=vocabulary
    )
    model = models.build(
        cloned_languages.config(vocabulary, longest=recipe.length), jax.random.key(seed)
    )
    outcome = training.train(
        model, file, recipe, workdir=run.workdir / "training", progress=True
    )
    found = cloned_languages.agreement(model, unseen, size, seed=seed)
    layers = np.arange(1, len(found.cosine) + 1)
    curves = {
        "clone is the nearest state": found.retrieved,
        "lens: translation": found.translated,
        "lens: untranslated word": found.copied,
        "cosine of clones": found.cosine,
    }
    plots.save_curves(
        run.workdir / "layers.png",
        list(curves),
        list(curves.values()),
        x=layers,
        title=f"A language and its clone ({_SHARE.value:.0%} clone)",
        x_label="layer",
        value_label="share of positions, or cosine",
    )
    print(
        tables.format_table(
            ["layer", *curves],
            [[int(n), *(float(c[n - 1]) for c in curves.values())] for n in layers],
        )
    )
    print(
        f"\nNearest embedding is the clone: {found.neighbours:.1%} of {size} words;"
        f" after an orthogonal map fitted on the other half: {found.mapped:.1%}"
        f" (chance {1 / size:.1%}). Training loss {outcome.loss:.3f}."
    )
    common.finish(
        run,
        {
            "training_loss": outcome.loss,
            **{
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in found._asdict().items()
            },
        },
    )
    print(f"\nlayers.png and summary.json are in {run.workdir}.")


if __name__ == "__main__":
    common.launch(main)
