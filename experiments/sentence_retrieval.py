"""From which layer can translations of a sentence be found, for which languages?

    python -m experiments.sentence_retrieval --model=xlm-roberta-base
        --parallel=texts.tsv --languages=en,de,zh

Default: the demo model on 150 verses of Luke, which it never saw, in ten languages.

Expect: accuracy 20% at the embedding of `demo`, 41% after one layer, the best (mining
F1 55%), and 11% after the last; chance 0.7%.

A sentence's vector is the mean of its tokens' vectors. For every layer and pair of
languages: accuracy (the nearest sentence by cosine is the translation; mean of both
directions), and F1 of mining by ratio margin, best in both directions, decided on
indices (Artetxe & Schwenk, 2019; Jones et al., 2021). --center takes each language's
mean away, for more than the 4 sentences that the margin averages over: of fewer, little
is left to compare it to. Chance is one over the number of sentences. The best layer, of
all pairs and of each, is the first that has the highest accuracy.
"""

import collections
import itertools
from typing import Any

import numpy as np

from jaxling import kernels, labelled_text, models, parallel_text, retrieval
from jaxling.report import plots, tables

from . import common

_TEXTS = 150
_NEIGHBORHOOD = 4


def main(argv: list[str]) -> None:
    """Retrieves at every layer, writes the table, the curves and the best heat-map."""
    del argv
    name, most = common.MODEL.value, common.PER_LANGUAGE.value or _TEXTS
    common.refuse(["models"], "one model is asked: see --model.")
    common.refuse(["k"], "the one nearest counts, and margins average over 4.")
    languages = common.LANGUAGES.value
    if common.PARALLEL.value:
        texts = parallel_text.read_parallel(common.PARALLEL.value, languages, most)
    else:
        texts = parallel_text.demo_parallel(languages, most)
    if common.CENTER.value and len(texts.items) <= _NEIGHBORHOOD:
        raise ValueError(
            f"--center needs more than {_NEIGHBORHOOD} texts that all languages have;"
            f" got {len(texts.items)}: see --per_language and --languages."
        )
    tokenizer = labelled_text.load_tokenizer(name, common.REVISION.value)
    model = models.load(name, revision=common.REVISION.value, dtype="float32")
    run = common.begin("sentence_retrieval", {"items": texts.items})
    spaces = parallel_text.spaces(model, tokenizer, texts, center=common.CENTER.value)
    names, n = list(spaces), len(texts.items)
    gold = np.stack([np.arange(n)] * 2, 1)
    depth = len(spaces[names[0]])
    rows: list[dict[str, Any]] = []
    for a, b in itertools.combinations(names, 2):
        for layer in range(depth):
            x, y = spaces[a][layer], spaces[b][layer]
            mined = retrieval.mine_bitext(x, y, k=_NEIGHBORHOOD)
            rows.append(
                {
                    "source": a,
                    "target": b,
                    "layer": layer,
                    "accuracy": (_accuracy(x, y) + _accuracy(y, x)) / 2,
                    "f1": retrieval.pair_f1(mined.pairs, gold),
                }
            )
    tables.write_parquet(
        run.workdir / "retrieval.parquet", {f: [r[f] for r in rows] for f in rows[0]}
    )
    curves = {
        measure: [
            float(np.mean([r[measure] for r in rows if r["layer"] == layer]))
            for layer in range(depth)
        ]
        for measure in ("accuracy", "f1")
    }
    best = max(range(depth), key=curves["accuracy"].__getitem__)
    # Layers come in order, and `max` takes the first of equal ones.
    of_pairs = [
        max(layers, key=lambda row: row["accuracy"])
        for layers in (rows[i : i + depth] for i in range(0, len(rows), depth))
    ]
    _report(run.workdir, name, names, rows, curves, best, n)
    _report_pairs(run.workdir, name, names, of_pairs, depth)
    common.finish(
        run,
        {
            "items": n,
            "languages": names,
            "mean_by_layer": curves,
            "best_layer": best,
            "best_of_pairs": of_pairs,
        },
    )
    print(f"\nLayer 0 is the input embedding. Table and pictures are in {run.workdir}.")


def _accuracy(x: np.ndarray, y: np.ndarray) -> float:
    nearest = np.asarray(kernels.nearest_neighbors(x, y, k=1).indices)[:, 0]
    return float(np.mean(nearest == np.arange(len(x))))


def _report(workdir, model, names, rows, curves, best, n) -> None:
    short = model.rstrip("/").split("/")[-1]
    lines = [[i, *pair] for i, pair in enumerate(zip(curves["accuracy"], curves["f1"]))]
    print(tables.format_table(["layer", "accuracy", "margin F1"], lines))
    print(f"best layer: {best}; chance: {1 / n:.4f}")
    plots.save_curves(
        workdir / "layers.png",
        ["accuracy", "margin F1"],
        [curves["accuracy"], curves["f1"]],
        title=f"{short}: retrieval among {n} sentences, mean over pairs",
        x_label="layer",
    )
    grid = np.full((len(names), len(names)), np.nan)
    for row in rows:
        if row["layer"] == best:
            i, j = names.index(row["source"]), names.index(row["target"])
            grid[i, j] = grid[j, i] = row["accuracy"]
    plots.save_heatmap(
        workdir / "pairs.png",
        names,
        names,
        grid,
        title=f"{short}: accuracy at layer {best} (chance {1 / n:.1%})",
        limits=(0, 1),
    )


def _report_pairs(workdir, model, names, of_pairs, depth) -> None:
    counts = collections.Counter(row["layer"] for row in of_pairs)
    listed = ", ".join(f"{i} for {counts[i]}" for i in sorted(counts))
    print(f"best layer of the {len(of_pairs)} pairs: {listed}")
    grid = np.full((len(names), len(names)), np.nan)
    for row in of_pairs:
        i, j = names.index(row["source"]), names.index(row["target"])
        grid[i, j] = grid[j, i] = row["layer"]
    plots.save_heatmap(
        workdir / "best_layers.png",
        names,
        names,
        grid,
        title=f"{model.rstrip('/').split('/')[-1]}: layer of the highest accuracy",
        value_format="{:.0f}",
        limits=(0, depth - 1),
    )


if __name__ == "__main__":
    common.launch(main)
