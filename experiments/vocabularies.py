"""Which tokens do vocabularies share, and do scripts part the embedding space?

    python -m experiments.vocabularies --model=xlm-roberta-base --models=google/mt5-base

Default: the built-in models `demo` and `demo-small` compared, and a map of the input
embedding of `demo`, coloured by writing system.

Expect: all 12,288 tokens shared, 62.5% of them not Latin (the built-in models have one
tokenizer). In the paper: 60.4% mean overlap of six vocabularies; 59.4% of the tokens
that mT5 and XLM-R share are not Latin.

Figures 1 and 2 of Hyperpolyglot LLMs (Wen-Yi and Mimno, 2023,
https://arxiv.org/abs/2311.18034). Overlap is |A and B| / min(|A|, |B|) by exact
equality of token strings; means run over all ordered pairs, the diagonal included; mT5
and XLM-R share about 110,000 tokens. Maps are principal components of the unit rows,
and UMAP (15 neighbours, minimal distance 0.2, Euclidean) where umap-learn is installed.

With `--model=xlm-roberta-base --shared_with=google/mt5-small,google/umt5-small` the map
holds 78,732 tokens, of which 8,333 are CYRILLIC, 9,022 CJK, 3,202 ARABIC and 1,073
DEVANAGARI; `summary.json` has these counts. The paper finds scripts isolated in XLM-R
and overlapping in mT5; the number for it here is the share of variance that lies
between writing systems.
"""

import importlib.util

import numpy as np
from absl import flags, logging

from jaxling import checkpoints, maps, neighborhoods, vocabulary, writing_systems
from jaxling.report import plots, tables

from . import common

_UMAP = flags.DEFINE_enum(
    "umap", "auto", ["auto", "on", "off"], "auto: where umap-learn is installed."
)


def main(argv: list[str]) -> None:
    """Compares vocabularies, maps the embedding, writes tables and pictures."""
    del argv
    model = common.MODEL.value
    words = {model: vocabulary.load_vocabulary(model, common.REVISION.value)}
    for other in [*common.models(), *common.SHARED_WITH.value]:
        if other not in words:
            words[other] = vocabulary.load_vocabulary(other)
    checkpoint = checkpoints.open_checkpoint(model, common.REVISION.value)
    name = checkpoint.input_embeddings(common.TENSOR.value)
    inputs = {"tensor": {"name": name, "sha256": checkpoint.digest(name)}}
    run = common.begin("vocabularies", inputs)

    overlap = vocabulary.vocabulary_overlap(words)
    if len(words) > 1:
        _report_overlap(run.workdir, overlap)
    restricted = [words[model], *(words[other] for other in common.SHARED_WITH.value)]
    ids = vocabulary.shared_tokens(*restricted)[0]
    ids = ids[ids < checkpoint.shape(name)[0]]
    rows = checkpoint.read(name, rows=ids)
    finite = np.isfinite(rows.astype(np.float32)).all(axis=1)
    left_out = [words[model].tokens[i] for i in ids[~finite]]
    if left_out:
        logging.warning(
            "Not on the map: %d rows of %s in %s are not finite, such as that of %s",
            *(len(left_out), name, model, left_out[0]),
        )
    summary = None
    if finite.sum() > 1 and rows.shape[1] > 1:
        summary = _map(run.workdir, words[model], ids[finite], rows[finite])
    else:
        print(
            f"\nNo map: {finite.sum()} rows of {name} in {model}, shape"
            f" {checkpoint.shape(name)}, belong to tokens that all of --shared_with"
            " have and are finite; it takes two of two dimensions."
        )
    sizes = zip(words, overlap.shared.diagonal().tolist())
    common.finish(
        run,
        {
            "tokens": dict(sizes),
            "mean_overlap": float(overlap.overlap.mean()),
            "mean_latin": float(overlap.latin.mean()),
            "map": summary,
            "not_finite": left_out,
        },
    )
    print(f"\nPictures, tables and summary.json are in {run.workdir}.")


def _report_overlap(workdir, overlap: vocabulary.Overlap) -> None:
    names = ["/".join(name.split("/")[-2:]) for name in overlap.names]
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    print(
        tables.format_table(
            ["vocabulary", "and", "shared", "overlap", "not Latin"],
            [
                [
                    names[j],
                    names[i],
                    overlap.shared[i, j],
                    overlap.overlap[i, j],
                    1 - overlap.latin[i, j],
                ]
                for i, j in pairs
            ],
        )
    )
    every = [(i, j) for i in range(len(names)) for j in range(len(names))]
    tables.write_parquet(
        workdir / "overlap.parquet",
        {
            "a": [overlap.names[i] for i, _ in every],
            "b": [overlap.names[j] for _, j in every],
            "shared": overlap.shared.ravel(),
            "overlap": overlap.overlap.ravel(),
            "latin": overlap.latin.ravel(),
        },
    )
    plots.save_heatmap(
        workdir / "overlap.png",
        names,
        names,
        overlap.overlap,
        title="Tokens shared, of the smaller vocabulary",
        limits=(0, 1),
    )
    plots.save_heatmap(
        workdir / "not_latin.png",
        names,
        names,
        1 - overlap.latin,
        title="Shared tokens that are not Latin",
        limits=(0, 1),
    )


def _map(workdir, words: vocabulary.Vocabulary, ids: np.ndarray, rows: np.ndarray):
    """Maps the rows, saves the maps, prints and returns what parts them."""
    categories = writing_systems.unicode_categories([words.strings[i] for i in ids])
    systems = writing_systems.writing_systems(
        [words.tokens[i] for i in ids], words.special[ids]
    )
    labels = neighborhoods.encode(systems)
    components = maps.principal_components(rows)
    between, chance = maps.variance_between(rows, labels)
    found = {"pca": components.coordinates}
    installed = importlib.util.find_spec("umap") is not None
    enough = len(ids) >= maps.FEWEST_FOR_UMAP
    if _UMAP.value == "on" or (_UMAP.value == "auto" and installed and enough):
        found["umap"] = maps.umap_map(rows, seed=common.SEED.value)
    elif not installed:
        logging.info("No UMAP map: pip install jaxling[umap]")
    columns = {
        "id": ids,
        "token": [words.tokens[i] for i in ids],
        "category": categories,
        "writing_system": systems,
    }
    for kind, points in found.items():
        columns |= {f"{kind}_x": points[:, 0], f"{kind}_y": points[:, 1]}
        plots.save_scatter(
            workdir / f"{kind}.png",
            systems,
            points,
            title=f"{kind.upper()} of {len(ids):,} input embeddings",
        )
    tables.write_parquet(workdir / "map.parquet", columns)
    counts = neighborhoods.counts(systems)
    print()
    print(tables.format_table(["writing system", "tokens"], list(counts.items())[:12]))
    print(
        f"\n{between:.1%} of the variance of {len(ids):,} embeddings lies between"
        f" {len(labels.names)} writing systems, {chance:.2%} would by chance; two"
        f" principal components hold {components.explained.sum():.1%}."
    )
    return {
        "tokens": len(ids),
        "categories": neighborhoods.counts(categories),
        "writing_systems": counts,
        "variance_between_writing_systems": between,
        "variance_between_by_chance": chance,
        "explained_by_components": components.explained.tolist(),
    }


if __name__ == "__main__":
    common.launch(main)
