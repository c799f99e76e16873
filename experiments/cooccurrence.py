"""Do words that stand together in the training text translate better, and directly?

    python -m experiments.cooccurrence --model=allenai/OLMo-7B-0424-hf \
        --trace=runs/trace/items.parquet --corpus=dolma/*.json.gz --workdir=runs/counts

Default: the demo model on 12 held-out words for each of 20 ordered pairs of languages,
traced and scored as `layer_trace` does, and the verses that it learned from; a document
is a verse in all of its languages.

Expect: an average r of 0.44 (0.33 to 0.54) of ln(count) and Score, and an average area
of 0.60 (0.53 to 0.68) by both words, positive and above 0.5 as in the paper; but no
other than by either word alone (0.61 and 0.59: the intervals of the differences hold
0). Half a minute on 2 cores.

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, and its released
code: x = ln(documents that hold both words), 0 where there is none; Pearson's r of x
and the Score for every ordered pair of languages, with a linear fit; and the area under
the ROC curve of x for translating by co-occurrence rather than through a pivot, for
every pair and averaged, beside that of either word's own count. The paper counted with
search engines over Dolma, by documents or within 100 tokens; here counts are exact, and
`--window=100` counts pairs of places. It expects a positive r and areas above 0.5 and
above the single words'; its values were not at hand. Intervals are 95%, by resampling
items.

Words are matched as text between boundaries, whatever their case; `--match_tokens` as
tokens. `--trace` takes items, Scores and behaviours from a run of `layer_trace`.
"""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tqdm
from absl import flags

from jaxling import behaviours, corpus, demo, models, vocabulary, word_translation
from jaxling.corpus import predictions
from jaxling.report import plots, tables

from . import common

_TRACE = flags.DEFINE_string(
    "trace", None, "The items.parquet of a layer_trace run, instead of a new trace."
)
_WINDOW = flags.DEFINE_integer(
    "window", None, "Count pairs of places so many words apart, not documents.", 1
)
_COLUMNS = ("source", "target", "word", "answer", "score", "behaviour")
_BOTH, _SOURCE, _TARGET = "both words", "source word alone", "target word alone"


def main(argv: list[str]) -> None:
    """Counts, relates counts to Scores and behaviours, leaves tables and pictures."""
    del argv
    if _TRACE.value:
        common.refuse(
            ("task", "lexicon", "word_lists", "names", "hard", "words", "shots")
            + ("draws", "language_tokens"),
            "--trace has items, Scores and behaviours.",
        )
        items = _read(_TRACE.value)
        run = common.begin("cooccurrence", {"items": _digest(items)})
    else:
        name, revision = common.MODEL.value, common.REVISION.value
        model = models.load(name, revision=revision)
        tokenizer = vocabulary.load_tokenizer(name, revision)
        task = common.translation_task(model, tokenizer)
        run = common.begin("cooccurrence", {"task": _digest(task)})
        items = _traced(model, tokenizer, task)
    words = sorted({*items["word"], *items["answer"]})
    if common.MATCH_TOKENS.value:
        tokenizer = vocabulary.load_tokenizer(common.MODEL.value, common.REVISION.value)
        plan = corpus.Plan(corpus.token_terms(words, tokenizer), tokenizer=tokenizer)
    else:
        plan = corpus.Plan(corpus.surface_terms(words))
    verses = demo.verses("train").text.values()
    counts = common.count(
        plan._replace(pairs=_WINDOW.value is None, window=_WINDOW.value),
        run,
        ("\n".join(verse) for verse in zip(*verses)),
    )
    place = {word: i for i, word in enumerate(words)}
    source, target = ([place[w] for w in items[c]] for c in ("word", "answer"))
    table = counts.document_pairs if _WINDOW.value is None else counts.window_pairs
    alone = counts.term_documents if _WINDOW.value is None else counts.term_occurrences
    counted = {
        _BOTH: corpus.pair_counts(table, source, target),
        _SOURCE: alone[source],
        _TARGET: alone[target],
    }
    tables.write_parquet(
        run.workdir / "items.parquet",
        {
            **items,
            "count": counted[_BOTH],
            "source_count": counted[_SOURCE],
            "target_count": counted[_TARGET],
        },
    )
    pairs = list(zip(items["source"], items["target"]))
    found = predictions.relate(
        pairs,
        counted,
        np.array(items["score"]),
        items["behaviour"],
        seed=common.SEED.value,
    )
    _draw(run.workdir, pairs, items, counted, found)
    unit = "documents" if _WINDOW.value is None else "places"
    summary = {
        "items": len(pairs),
        "documents": counts.documents,
        "counted": unit,
        "without_count": int((counted[_BOTH] == 0).sum()),
        "average": {
            kind: _plain(getattr(found, kind))
            for kind in ("correlation", "area", "advantage")
        },
        "pairs": {
            f"{pair.source}-{pair.target}": {
                **pair._asdict(),
                "correlation": _plain(pair.correlation),
                "area": _plain(pair.area),
            }
            for pair in found.pairs
        },
        "damage": counts.damage._asdict(),
    }
    common.finish(run, summary)
    _show(found, summary, run.workdir)


def _digest(content) -> str:
    return hashlib.sha256(repr(content).encode(errors="surrogatepass")).hexdigest()


def _traced(model, tokenizer, task) -> dict[str, list]:
    """Items with Scores and behaviours, as a run of `layer_trace` has them."""
    prompts: dict[str, Any] = dict(
        shots=common.SHOTS.value,
        seed=common.SEED.value,
        language_tokens=common.entries(common.LANGUAGE_TOKENS.value, "language_tokens")
        or None,
        progress=lambda steps: tqdm.tqdm(steps, unit="batch", disable=None),
    )
    found = behaviours.trace(model, tokenizer, task, **prompts)
    scores = word_translation.score_task(
        model, tokenizer, task, draws=common.DRAWS.value, **prompts
    )
    fields = _COLUMNS[:4]
    columns = {name: [getattr(i, name) for i in task.items] for name in fields}
    decided = found.behaviours.kind
    return {**columns, "score": scores.score.tolist(), "behaviour": list(decided)}


def _read(path: str) -> dict[str, list]:
    """The columns of a former run.

    Raises:
      ValueError: the file is no such table.
      OSError: it cannot be read.
    """
    try:
        table = pa.parquet.read_table(path, columns=list(_COLUMNS))
    except pa.ArrowException as error:
        raise ValueError(
            f"{path} is no items.parquet of layer_trace: {error}"
        ) from None
    if table.num_columns < len(_COLUMNS) or not table.num_rows:
        raise ValueError(
            f"{path} needs rows and the columns {', '.join(_COLUMNS)}; it has"
            f" {table.num_rows} rows and {', '.join(table.column_names) or 'none'}."
        )
    return table.to_pydict()


def _plain(estimates: dict[str, predictions.Estimate]) -> dict[str, dict]:
    return {kind: estimate._asdict() for kind, estimate in estimates.items()}


def _draw(workdir, pairs, items, counted, found) -> None:
    """The paper's panels, and the areas as bars."""
    x, y = predictions.log_counts(counted[_BOTH]), np.array(items["score"])
    own = [
        [i for i, pair in enumerate(pairs) if pair == (one.source, one.target)]
        for one in found.pairs
    ]
    plots.save_fits(
        workdir / "scores.png",
        [
            f"{one.source} → {one.target}   r = {one.correlation[_BOTH].value:.2f}"
            for one in found.pairs
        ],
        [np.stack([x[rows], y[rows]], 1) for rows in own],
        [[items["behaviour"][i] for i in rows] for rows in own],
        title="Score of a word against how often it stands with its translation",
        x_label="ln(count of both words)",
        y_label="Score",
    )
    kinds = [_BOTH, _SOURCE, _TARGET]
    for name, title, part, chance in (
        ("areas", "How counts tell co-occurrence from pivots", "area", 0.5),
        ("correlations", "Correlation of ln(count) and Score", "correlation", 0.0),
    ):
        rows = [getattr(one, part) for one in found.pairs] + [getattr(found, part)]
        values = [[row[kind].value for row in rows] for kind in kinds]
        below = [[row[k].value - row[k].low for row in rows] for k in kinds]
        above = [[row[k].high - row[k].value for row in rows] for k in kinds]
        plots.save_bars(
            workdir / f"{name}.png",
            [f"{one.source} → {one.target}" for one in found.pairs] + ["average"],
            values,
            series=kinds,
            errors=np.array([below, above]),
            title=title,
            value_label="area under the ROC curve" if part == "area" else "Pearson's r",
            value_format="{:.2f}",
            reference=chance,
        )


def _show(found, summary, workdir) -> None:
    def cells(estimate):
        return [estimate.value, f"{estimate.low:.2f} – {estimate.high:.2f}"]

    header = ["pair", "items", "pivots", "r", "95%", "area", "95%", "source", "target"]
    rows = [
        [
            f"{one.source} → {one.target}",
            one.items,
            one.pivot,
            *cells(one.correlation[_BOTH]),
            *cells(one.area[_BOTH]),
            one.area[_SOURCE].value,
            one.area[_TARGET].value,
        ]
        for one in found.pairs
    ]
    pivots = sum(one.pivot for one in found.pairs)
    total = [
        *("average", summary["items"], pivots),
        *cells(found.correlation[_BOTH]),
        *cells(found.area[_BOTH]),
        found.area[_SOURCE].value,
        found.area[_TARGET].value,
    ]
    print(tables.format_table(header, [*rows, total], digits=2))
    print()
    for kind, more in found.advantage.items():
        print(
            f"The average area by both words minus that by the {kind}: {more.value:.3f}"
            f" ({more.low:.3f} – {more.high:.3f})."
        )
    print(
        f"\nr is of ln(count) and Score, areas are under the ROC curve for translating"
        f" directly; source and target: by one word's count. Counts are"
        f" {summary['counted']} among {summary['documents']:,} documents;"
        f" {summary['without_count']:,} of {summary['items']:,} items have none.\nItems"
        f" with counts: {workdir / 'items.parquet'}; pictures beside it."
    )


if __name__ == "__main__":
    common.launch(main)
