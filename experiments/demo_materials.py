"""What are the demo models made from, and what do their first weights know already?

    python -m experiments.demo_materials --materials_for=demo --materials_tokens=2000000

Default: mines the lexicon, trains the tokenizer, and writes the first weights of
`demo-small` and 100,000 tokens of documents; then the lexicon's sizes and the
writing systems of frequent words' neighbours before any training.

Expect: 358 to 616 word pairs with English for each of nine languages; 12,288 tokens;
before training, neighbours in 5.4 writing systems.

With `--materials_tokens=2000000`, and `--materials_for=demo` or `demo-small`, the
workdir holds what that model was trained on; its card has the command that trains it.

Word pairs are by association over aligned verses (log-likelihood ratio above 25, Dice
above 0.3, mutual best); the first embedding is a singular value decomposition of which
verses hold which tokens in any language, beside columns for language and frequency.
"""

import itertools

from absl import flags

from jaxling import demo, models, training
from jaxling.demo import documents, evaluation, lexicons, tokenizer
from jaxling.demo import model as built_in
from jaxling.report import tables

from . import common

_NAME = flags.DEFINE_enum(
    "materials_for", "demo-small", list(built_in.WIDTHS), "Which model's."
)
_TOKENS = flags.DEFINE_integer("materials_tokens", 100_000, "Tokens of documents.")


def main(argv: list[str]) -> None:
    """Makes lexicon, tokenizer, first weights and documents; prints what they hold."""
    del argv
    common.refuse(
        ("model", "revision", "tensor"),
        "the first weights are made; --materials_for says of which model.",
    )
    if _TOKENS.value < 1:
        raise ValueError(f"--materials_tokens must be at least 1; got {_TOKENS.value}.")
    run = common.begin("demo_materials", {"text": "demo.verses, train"})
    verses = demo.verses("train")
    mined = lexicons.mine(verses)
    lexicons.write(mined, run.workdir / "lexicon")
    pieces = tokenizer.train(verses)
    model = built_in.initial_model(
        pieces, verses, built_in.WIDTHS[_NAME.value], common.SEED.value
    )
    models.save(model, run.workdir / "model")
    tokenizer.save(pieces, run.workdir / "model")
    file = training.write_tokens(
        run.workdir / "tokens",
        documents.training_documents(
            pieces,
            verses,
            lexicons.training_pairs(mined),
            tokens=_TOKENS.value,
            seed=common.SEED.value,
        ),
        vocabulary_size=pieces.get_vocab_size(),
    )
    sizes = {
        (left, right): [len(mined.lexicon[left, right, s]) for s in lexicons.SPLITS]
        for left, right in itertools.combinations(demo.LANGUAGES, 2)
    }
    with_english = {pair[1]: counts for pair, counts in sizes.items() if "eng" in pair}
    print(
        tables.format_table(
            ["English and", *lexicons.SPLITS, "looser"],
            [
                [demo.LANGUAGES[code], *counts, len(mined.loose["eng", code])]
                for code, counts in with_english.items()
            ],
        )
    )
    scripts = evaluation.neighbour_scripts(model, pieces)
    print(
        f"\n{pieces.get_vocab_size():,} tokens; {len(file.tokens):,} tokens in"
        f" {len(file.documents) - 1:,} documents. Before training, the 20 nearest"
        f" embeddings of {len(scripts)} frequent English words are of"
        f" {scripts.mean():.1f} writing systems. All in {run.workdir}."
    )
    common.finish(
        run,
        {
            "lexicon": {"-".join(pair): counts for pair, counts in sizes.items()},
            "tokens": len(file.tokens),
            "vocabulary": pieces.get_vocab_size(),
            "neighbour_scripts_before_training": float(scripts.mean()),
        },
    )


if __name__ == "__main__":
    common.launch(main)
