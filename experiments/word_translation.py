"""Does a source word make its translation likelier than other words do?

    python -m experiments.word_translation --model=allenai/OLMo-1B-hf \
        --lexicon=eng-fra:en-fr.txt --names=fra:French --workdir=runs/words

Default: 12 held-out words for each of 20 ordered pairs of the demo's languages, five
prompts of five training examples each, scored by the demo model.

Expect: 0.73 of the words first among ten (chance 0.1), rank 0.8 (chance 4.5), Score
0.061, means of 20 pairs; 34 s of CPU time.

The task of He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, with
any bilingual lexicon in place of a paid translator and its distractors in place of a
chat model's: P(y | w) = exp(mean log-probability of the tokens of the translation y
after the prompt for w), Score = P(y | w) minus the mean of P(y | w') over nine other
source words. The paper has 2,000 words in 12 ordered pairs of English, Chinese, French
and Japanese, and no accuracy; the share of words that beat all nine distractors
(chance: 0.1) and their rank (chance: 4.5) are ours. Intervals are 95%, by resampling
items. `--hard` takes the nearest words as distractors, by the cosine of mean input
embeddings; `--word_lists` asks only about listed words, as the paper does about English
nouns, verbs and adjectives. `task.json` holds the questions: `--task=task.json` asks
another model the same ones.
"""

import hashlib

import numpy as np
import tqdm
from absl import flags

from jaxling import models, vocabulary, word_translation
from jaxling.report import plots, tables

from . import common

_BATCH = flags.DEFINE_integer("batch", 16, "Prompts at a time, ten questions each.", 1)


def main(argv: list[str]) -> None:
    """Builds or reads the task, scores it, leaves tables and heat-maps."""
    del argv
    name, revision = common.MODEL.value, common.REVISION.value
    model = models.load(name, revision=revision)
    tokenizer = vocabulary.load_tokenizer(name, revision)
    task = common.translation_task(model, tokenizer)
    run = common.begin("word_translation", {"task": _digest(task)})
    word_translation.save_task(task, run.workdir / "task.json")
    scores = word_translation.score_task(
        model,
        tokenizer,
        task,
        shots=common.SHOTS.value,
        draws=common.DRAWS.value,
        seed=common.SEED.value,
        batch=_BATCH.value,
        language_tokens=common.entries(common.LANGUAGE_TOKENS.value, "language_tokens")
        or None,
        progress=lambda batches: tqdm.tqdm(batches, unit="batch", disable=None),
    )
    tables.write_parquet(
        run.workdir / "items.parquet",
        {
            **{field: [getattr(item, field) for item in task.items] for field in _TEXT},
            "distractors": [list(item.distractors) for item in task.items],
            **scores._asdict(),
        },
    )
    pairs = word_translation.summarize(task, scores, seed=common.SEED.value)
    _draw(run.workdir, pairs)
    means = {
        "score": float(np.mean([pair.score.mean for pair in pairs])),
        "first": float(np.mean([pair.first.mean for pair in pairs])),
        "rank": float(np.mean([pair.rank.mean for pair in pairs])),
    }
    summary = {
        "items": len(task.items),
        "mean_over_pairs": means,
        "pairs": {
            f"{pair.source}-{pair.target}": {
                "items": pair.items,
                **{
                    kind: getattr(pair, kind)._asdict()
                    for kind in ("score", "first", "rank")
                },
            }
            for pair in pairs
        },
    }
    common.finish(run, summary)
    print(tables.format_table(_HEADERS, [_row(pair) for pair in pairs], digits=4))
    print(
        f"\nMean of {len(pairs)} ordered pairs: Score {means['score']:.4f}, first among"
        f" ten {means['first']:.3f} (chance 0.1), rank {means['rank']:.2f} (chance"
        f" 4.5).\nItems, questions and heat-maps are in {run.workdir}."
    )


_TEXT = ("source", "target", "word", "answer")
_HEADERS = ["pair", "items", "Score", "95%", "first of ten", "95%", "rank"]


def _digest(task: word_translation.Task) -> str:
    return hashlib.sha256(repr(task).encode(errors="surrogatepass")).hexdigest()


def _row(pair: word_translation.PairSummary) -> list:
    return [
        f"{pair.source} → {pair.target}",
        pair.items,
        pair.score.mean,
        f"{pair.score.low:.4f} – {pair.score.high:.4f}",
        pair.first.mean,
        f"{pair.first.low:.2f} – {pair.first.high:.2f}",
        pair.rank.mean,
    ]


def _draw(workdir, pairs: list[word_translation.PairSummary]) -> None:
    """A heat-map of each mean with its interval."""
    for kind, title, digits in (
        ("score", "Score", 3),
        ("first", "Share of words that beat nine distractors", 2),
        ("rank", "Rank among ten words, 0 is best", 1),
    ):
        # Mean, lower end, upper end: a matrix of each.
        columns = zip(*(getattr(pair, kind) for pair in pairs))
        found = [word_translation.matrix([p[:2] for p in pairs], c) for c in columns]
        (codes, mean), (_, low), (_, high) = found
        plots.save_heatmap(
            workdir / f"{kind}.png",
            codes,
            codes,
            mean,
            intervals=(low, high),
            title=f"{title} (and its 95% interval)",
            row_label="source",
            column_label="target",
            value_format=f"{{:.{digits}f}}",
        )


if __name__ == "__main__":
    common.launch(main)
