"""Which layers, models and languages hold the same texts in the same arrangement?

    python -m experiments.layer_similarity --model=xlm-roberta-base
        --models=bert-base-multilingual-cased --parallel=texts.tsv

Default: the demo model against itself and against `demo-small`, and its ten languages
against each other, on 150 verses of Luke that neither saw.

Expect: on `demo` a debiased CKA between languages of 0.27 at the embedding, 0.29 after
layer 1 and 0.22 after the last; 26%, 21% and 18% of the 10 nearest texts shared (chance
7%).

Debiased linear CKA (Kornblith et al., 2019; Nguyen et al., 2021), 0 for unrelated and 1
for equal arrangements, and the share of the 10 nearest texts that two spaces have in
common: layer by layer within a model and between models (texts of the first language),
and language by language at every layer of --model. A text's vector is the mean of its
tokens' vectors; layer 0 is the input embedding. Mantel's test asks of every layer
whether languages that lie close together (cosine of their mean vectors) also arrange
the texts alike (CKA): a correlation over pairs of languages, p by relabelling them. The
same cosines put the languages into --clusters groups (average linkage), as Fan et al.
(2021) do.
"""

import numpy as np
from absl import flags

from jaxling import (
    checkpoints,
    kernels,
    labelled_text,
    models,
    neighborhoods,
    parallel_text,
    retrieval,
)
from jaxling.report import plots, tables

from . import common

_TEXTS = 150
_K = 10
_CLUSTERS = flags.DEFINE_integer(
    "clusters", 3, "Groups of languages, by the closeness of their mean vectors.", 2
)


def main(argv: list[str]) -> None:
    """Compares spaces, writes one table and a heat-map for each comparison."""
    del argv
    languages, most = common.LANGUAGES.value, common.PER_LANGUAGE.value or _TEXTS
    if common.PARALLEL.value:
        texts = parallel_text.read_parallel(common.PARALLEL.value, languages, most)
    else:
        texts = parallel_text.demo_parallel(languages, most)
    if len(texts.items) < 4:
        raise ValueError(
            "At least 4 texts that all languages have are needed for a debiased CKA;"
            f" got {len(texts.items)}: see --per_language and --languages."
        )
    names = common.models()
    k = min(common.K.value or _K, len(texts.items) - 1)
    for i, name in enumerate(names):  # before anything is computed
        _check(name, common.REVISION.value if i == 0 else None)
    run = common.begin("layer_similarity", {"items": texts.items})
    first, *others = list(texts.texts)
    own = _spaces(names[0], common.REVISION.value, texts)
    alone = texts._replace(texts={first: texts.texts[first]})
    against = {names[0]: own[first]}
    for name in names[1:]:
        against[name] = _spaces(name, None, alone)[first]
    rows = []
    for name, space in against.items():
        title = f"{len(texts.items)} texts in {first}"
        rows += _grid(run.workdir, names[0], own[first], name, space, k, title)
    by_layer = _languages(run.workdir, names[0], own, k, rows)
    groups = [_clusters(own, layer) for layer in range(len(own[first]))]
    tables.write_parquet(
        run.workdir / "similarity.parquet", {f: [r[f] for r in rows] for f in rows[0]}
    )
    depth, n = len(own[first]), len(texts.items)
    lines = [[i, *(column[i] for column in by_layer.values())] for i in range(depth)]
    header = ["layer", "CKA of languages", f"{k} nearest shared", "Mantel r", "p"]
    print(tables.format_table(header, lines))
    for layer, group in enumerate(groups):
        if group:
            print(f"layer {layer}, by closeness: {' | '.join(map(' '.join, group))}")
    plots.save_curves(
        run.workdir / "languages_by_layer.png",
        ["debiased CKA", f"{k} nearest shared (chance {k / (n - 1):.0%})"],
        [by_layer["cka"], by_layer["neighbors"]],
        title=f"Mean over pairs of {1 + len(others)} languages",
        x_label="layer",
    )
    common.finish(
        run,
        {
            "items": len(texts.items),
            "languages_by_layer": by_layer,
            "clusters_by_layer": groups,
            "k": k,
        },
    )
    print(f"\nTable and pictures are in {run.workdir}.")


def _check(name, revision) -> None:
    models.family_of(checkpoints.open_checkpoint(name, revision).config, name)
    labelled_text.load_tokenizer(name, revision)


def _spaces(name, revision, texts):
    tokenizer = labelled_text.load_tokenizer(name, revision)
    model = models.load(name, revision=revision, dtype="float32")
    return parallel_text.spaces(model, tokenizer, texts, center=common.CENTER.value)


def _nearest(space: np.ndarray, k: int) -> list[np.ndarray]:
    return [np.asarray(kernels.all_pairs_neighbors(x, k=k).indices) for x in space]


def _grid(workdir, a, x, b, y, k, texts) -> list[dict]:
    """Layers of `a` against layers of `b`, on the same texts."""
    cka = np.asarray(kernels.cka_grid(x, y, debiased=True))
    lists = _nearest(x, k), _nearest(y, k)
    shared = np.array(
        [
            [neighborhoods.shared_neighbors(p, q).mean() / k for q in lists[1]]
            for p in lists[0]
        ]
    )
    short = ["/".join(name.split("/")[-2:]) for name in (a, b)]
    for measure, values in (("cka", cka), ("neighbors", shared)):
        plots.save_heatmap(
            workdir / f"{measure}_{short[1].replace('/', '_')}.png",
            [str(i) for i in range(len(x))],
            [str(i) for i in range(len(y))],
            values,
            title={
                "cka": f"Debiased CKA, {texts}",
                "neighbors": f"{k} nearest shared, {texts}",
            }[measure],
            row_label=f"layer of {short[0]}",
            column_label=f"layer of {short[1]}",
            limits=(0, 1),
        )
    return [
        _row("layers", (a, b), (i, j), cka[i, j], shared[i, j])
        for i in range(len(x))
        for j in range(len(y))
    ]


def _languages(workdir, model, spaces, k, rows) -> dict[str, list[float]]:
    """Languages against each other at every layer; means by layer, best as picture.

    CKA is NaN where texts of a language all have one vector; such pairs do not count.
    """
    names = list(spaces)
    lists = {name: _nearest(spaces[name], k) for name in names}
    depth, size = len(lists[names[0]]), len(names)
    grids = np.full((2, depth, size, size), np.nan)
    for layer in range(depth):
        here = np.stack([spaces[name][layer] for name in names])
        cka = np.asarray(kernels.cka_grid(here, here, debiased=True))
        for i in range(size):
            for j in range(i):
                shared = neighborhoods.shared_neighbors(
                    lists[names[i]][layer], lists[names[j]][layer]
                )
                found = cka[i, j], shared.mean() / k
                grids[:, layer, i, j] = grids[:, layer, j, i] = found
                pair, at = (names[j], names[i]), (layer, layer)
                rows.append(_row("languages", pair, at, *grids[:, layer, i, j]))
    known = np.isfinite(grids)
    counts = known.sum((2, 3))
    sums = np.where(known, grids, 0).sum((2, 3))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    if counts[0].any():
        best = int(np.nanargmax(means[0]))
        plots.save_heatmap(
            workdir / "languages.png",
            names,
            names,
            grids[0, best],
            title=f"{model.rstrip('/').split('/')[-1]}: debiased CKA at layer {best}",
            limits=(0, 1),
        )
    else:
        print("No two languages have a debiased CKA at any layer.")
    tests = [_mantel(spaces, grids[0, layer], layer) for layer in range(depth)]
    return {
        "cka": means[0].tolist(),
        "neighbors": means[1].tolist(),
        "mantel": [test.correlation for test in tests],
        "mantel_p": [test.p_value for test in tests],
    }


def _mantel(spaces, cka, layer) -> retrieval.Mantel:
    """Closeness of languages against likeness; NaN for two, or without their means."""
    if len(spaces) < 3 or common.CENTER.value:
        return retrieval.Mantel(np.nan, np.nan)
    likeness = np.where(np.eye(len(cka), dtype=bool), 1, cka)
    order = np.argsort(np.argsort(list(spaces)))  # as `spaces` has the languages
    closeness = retrieval.language_similarity(_centroids(spaces, layer)[order])
    return retrieval.mantel(
        closeness, likeness, permutations=999, seed=common.SEED.value
    )


def _centroids(spaces, layer) -> np.ndarray:
    """Mean vectors at a layer, of the languages in alphabetical order."""
    rows = [space[layer] for space in spaces.values()]
    languages = [name for name, own in zip(spaces, rows) for _ in own]
    return retrieval.language_centroids(np.concatenate(rows), languages)


def _clusters(spaces, layer) -> list[list[str]]:
    """Groups of languages with close mean vectors; none where Mantel's test is NaN."""
    if len(spaces) < 3 or common.CENTER.value:
        return []
    labels = retrieval.cluster_languages(_centroids(spaces, layer), _CLUSTERS.value)
    names = np.array(sorted(spaces))
    return [names[labels == label].tolist() for label in np.unique(labels)]


def _row(between, pair, layers, cka, shared) -> dict:
    return {
        "between": between,
        "a": pair[0],
        "b": pair[1],
        "layer_a": layers[0],
        "layer_b": layers[1],
        "debiased_cka": float(cka),
        "neighbors_shared": float(shared),
    }


if __name__ == "__main__":
    common.launch(main)
