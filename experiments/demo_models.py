"""What can the demo models do, by words and verses that they never met?

    python -m experiments.demo_models --model=demo --items=40 --verses=60

Default: 12 held-out words of each of 20 ordered pairs of languages and 30 held-out
verses of each language, with the packaged `demo`.

Expect: 0.72 of the words first among ten (chance 0.1), 1.08 nats a token below the
unigram model, frequent words' neighbours in 6.5 writing systems; the cards have 800
words, with intervals, and three seeds.

A held-out word counts where its translation is likelier after it than after nine other
held-out words (chance 0.10), in the five-shot prompt of He et al., 2025,
https://arxiv.org/abs/2505.16385; Score is the difference in probability to the mean of
the nine. Intervals resample concepts. Loss is compared with the unigram model of the
same language's training verses. `--items=0` and `--verses=0` take all; the card has
40 words and 60 verses. `--unseen_pairs` asks for words of the four pairs of languages
that met in no document, both ways.
"""

import numpy as np
from absl import flags

from jaxling import checkpoints, models, vocabulary
from jaxling.demo import evaluation, lexicons, tokenizer
from jaxling.report import plots, tables

from . import common

_ITEMS = flags.DEFINE_integer("items", 12, "Words of a pair of languages; 0 for all.")
_VERSES = flags.DEFINE_integer("verses", 30, "Verses of a language; 0 for all.")
_UNSEEN = flags.DEFINE_bool(
    "unseen_pairs", False, "Words of language pairs that met in no document, instead."
)
_SPLIT = flags.DEFINE_enum(
    "lexicon_split", "test", list(lexicons.SPLITS), "Where the words are from."
)


def main(argv: list[str]) -> None:
    """Ranks translations, measures verses and neighbours; writes a record."""
    del argv
    name = common.MODEL.value
    pieces = tokenizer.packaged()
    theirs = vocabulary.load_tokenizer(name, common.REVISION.value).get_vocab()
    if theirs != pieces.get_vocab():
        raise ValueError(
            "Words and verses are measured in the tokens of the demo models, so --model"
            f" must have their vocabulary; {name} has another, of {len(theirs)} tokens."
            " For any model: python -m experiments.word_translation."
        )
    checkpoint = checkpoints.open_checkpoint(name, common.REVISION.value)
    tensor = checkpoint.input_embeddings(common.TENSOR.value)
    inputs = {"tensor": {"name": tensor, "sha256": checkpoint.digest(tensor)}}
    run = common.begin("demo_models", inputs)
    model = models.load(name, revision=common.REVISION.value, dtype="float32")
    pairs = evaluation.ORDERED_PAIRS
    if _UNSEEN.value:
        pairs = evaluation.UNSEEN_ORDERED_PAIRS
    rankings = {
        pair: evaluation.rank_translations(
            model,
            pieces,
            *pair,
            split=_SPLIT.value,
            count=_ITEMS.value or None,
            seed=common.SEED.value,
        )
        for pair in pairs
    }
    words = {
        "-".join(pair): evaluation.summary([ranking])
        for pair, ranking in rankings.items()
    }
    pooled = evaluation.summary(list(rankings.values()))
    losses = evaluation.held_out_losses(
        model, pieces, verses_a_language=_VERSES.value or None
    )
    scripts = evaluation.neighbour_scripts(model, pieces)

    header = ["pair", "items", "first", "low", "high", "Score", "low", "high"]
    rows = [
        [pair, found.items, *found.first, *found.score]
        for pair, found in [*words.items(), ("all", pooled)]
    ]
    print(tables.format_table(header, rows, digits=4))
    print()
    print(
        tables.format_table(
            ["language", "loss", "unigram", "perplexity", "tokens"],
            [
                [code, x.model, x.unigram, float(np.exp(x.model)), x.tokens]
                for code, x in losses.items()
            ],
        )
    )
    gain = float(np.mean([x.unigram - x.model for x in losses.values()]))
    print(
        f"\n{gain:.2f} nats a token below the unigram model on average. The 20 nearest"
        f" embeddings of {len(scripts)} frequent English words are of"
        f" {scripts.mean():.1f} writing systems (at least {scripts.min()})."
    )
    plots.save_bars(
        run.workdir / "words.png",
        list(words),
        [found.first.mean for found in words.values()],
        title="Held-out words ranked first among ten",
        reference=0.1,
        limits=(0, 1),
    )
    common.finish(
        run,
        {
            "words": {
                pair: {
                    "items": found.items,
                    "first": found.first._asdict(),
                    "score": found.score._asdict(),
                }
                for pair, found in [*words.items(), ("all", pooled)]
            },
            "losses": {code: loss._asdict() for code, loss in losses.items()},
            "below_unigram": gain,
            "neighbour_scripts": {
                "mean": float(scripts.mean()),
                "least": int(scripts.min()),
                "words": len(scripts),
            },
        },
    )


if __name__ == "__main__":
    common.launch(main)
