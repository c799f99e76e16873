"""How well do embeddings translate words by retrieval, and what does a map add?

    python -m experiments.lexicon_induction --model=xlm-roberta-base

Default: the demo model and its lexicon, English with each of its nine other languages
in both directions; maps fitted on training words, asked on held-out test words.

Expect: on `demo`, whose languages share one space, no map is needed: P@1 56% by nearest
neighbour, 61% by inverted softmax; maps fitted on a few hundred words lose some of it
(Procrustes 26% and 41%, RCSLS the same, ridge 17% and 40%).

A word's vector is the mean of the input embeddings of its tokens, at length one,
centred, at length one again. Candidates are all words of the target language that the
lexicon holds, training words too. Retrieval: nearest neighbour, CSLS (Conneau et al.,
2018), inverted softmax (Smith et al., 2017), ratio margin (Artetxe & Schwenk, 2019).
The margin is found for the 100 nearest, of which it takes the first ten; a pair around
which cosines are not positive on average (of a handful of centred words) has none.
Maps: none, orthogonal Procrustes, ridge regression, RCSLS (Joulin et al., 2018) within
the spectral ball. P@k: any gold translation among the first k; MRR over the first 10;
coverage: share of the test words that have a vector. `--train` and `--test` bring MUSE
dictionaries.
"""

from typing import NamedTuple

import numpy as np
from absl import flags

from jaxling import checkpoints, demo, dictionaries, labelled_text, retrieval
from jaxling.report import plots, tables

from . import common

_TRAIN = flags.DEFINE_string("train", None, "MUSE file that maps are fitted on.")
_TEST = flags.DEFINE_string("test", None, "MUSE file of the words that are asked.")
_CANDIDATES = 100
_MEASURES = ("p1", "p5", "p10", "mrr", "coverage")


def main(argv: list[str]) -> None:
    """Asks every pair of languages by every map and method, and records it."""
    del argv
    model, revision = common.MODEL.value, common.REVISION.value
    common.refuse(
        ["models", "k", "center", "parallel", "per_language"],
        "words of one model are asked, ten answers each.",
    )
    lexicons = _lexicons()
    checkpoint = checkpoints.open_checkpoint(model, revision)
    name = checkpoint.input_embeddings(common.TENSOR.value)
    tokenizer = labelled_text.load_tokenizer(model, revision)
    matrix = checkpoint.read(name)
    spaces = {  # of all pairs, before anything is written
        pair: _spaces(pair, train, test, tokenizer, matrix)
        for pair, (train, test) in lexicons.items()
    }
    run = common.begin(
        "lexicon_induction",
        {"tensor": {"name": name, "sha256": checkpoint.digest(name)}},
    )
    rows = []
    for pair, space in spaces.items():
        rows += _asked(pair, space)
    tables.write_parquet(
        run.workdir / "induction.parquet", {f: [r[f] for r in rows] for f in rows[0]}
    )
    means = {}
    for key in dict.fromkeys(map(_key, rows)):
        own = [row for row in rows if _key(row) == key]
        means[key] = {m: float(np.mean([row[m] for row in own])) for m in _MEASURES}
    _report(run.workdir, rows, means)
    common.finish(
        run,
        {
            "pairs": len(lexicons),
            "means": [
                {"map": kind, "method": method, **found}
                for (kind, method), found in means.items()
            ],
        },
    )
    print(f"\nMeans over {len(lexicons)} ordered pairs; the table is in {run.workdir}.")


def _key(row: dict) -> tuple[str, str]:
    return row["map"], row["method"]


def _lexicons():
    """Training and test pairs of each ordered pair of languages."""
    if bool(_TRAIN.value) != bool(_TEST.value):
        raise ValueError("--train and --test go together: two MUSE dictionaries.")
    if _TRAIN.value:
        common.refuse(["languages"], "--train and --test are of one pair of languages.")
        read = [dictionaries.read_dictionary(f.value) for f in (_TRAIN, _TEST)]
        return {("source", "target"): tuple(read)}
    chosen = common.LANGUAGES.value or list(demo.LANGUAGES)
    others = [language for language in chosen if language != "eng"]
    if unknown := sorted(set(chosen) - set(demo.LANGUAGES)):
        raise ValueError(f"No language {unknown}; there are {list(demo.LANGUAGES)}.")
    if not others:
        raise ValueError(f"--languages must name one besides eng; got {chosen}.")
    ordered = [p for other in others for p in (("eng", other), (other, "eng"))]
    return {
        pair: tuple(demo.lexicon(*pair, split) for split in ("train", "test"))
        for pair in ordered
    }


class _Spaces(NamedTuple):
    """One ordered pair of languages: two spaces, and what is learnt and asked."""

    source: np.ndarray
    target: np.ndarray
    learnt: np.ndarray
    gold: dict[int, set[int]]
    entries: int
    candidates: int


def _spaces(pair, train, test, tokenizer, matrix) -> _Spaces:
    """Raises ValueError where no pair of words can be learnt from, or be asked for."""
    sides = [list(dict.fromkeys(p[i] for p in [*train, *test])) for i in (0, 1)]
    found = [retrieval.word_vectors(tokenizer, matrix, words) for words in sides]
    has = [np.any(vectors != 0, axis=1) for vectors in found]
    place = [{w: i for i, w in enumerate(words)} for words in sides]
    source, target = map(retrieval.aligned, found)

    def rows_of(pairs):
        at = [(place[0][a], place[1][b]) for a, b in pairs]
        kept = [p for p in at if has[0][p[0]] and has[1][p[1]]]
        return np.array(kept, int).reshape(-1, 2)

    learnt, tested = rows_of(train), rows_of(test)
    for rows, given, purpose, without in [
        (learnt, train, "training", "no map can be fitted"),
        (tested, test, "test", "nothing can be asked"),
    ]:
        if not len(rows):
            raise ValueError(
                f"{' to '.join(pair)}: of {len(given)} {purpose} pairs none has a"
                f" vector on both sides, so that {without}."
            )
    gold: dict[int, set[int]] = {}
    for a, b in tested:
        gold.setdefault(int(a), set()).add(int(b))
    entries = len({a for a, _ in test})
    return _Spaces(source, target, learnt, gold, entries, int(has[1].sum()))


def _asked(pair, space) -> list[dict]:
    """Every map and method on one ordered pair of languages."""
    source, target, learnt, gold, entries, candidates = space
    asked = sorted(gold)
    results = []
    for kind in retrieval.MAPS:
        mapped = source @ retrieval.fit_map(kind, source, target, learnt)
        for method in retrieval.METHODS:
            # Ten candidates in another order would be the nearest's P@10.
            lists = retrieval.translate(
                mapped, target, k=_CANDIDATES, method=method
            ).indices[asked, :10]
            scores = retrieval.evaluate_induction(lists, asked, gold, entries=entries)
            results.append(
                {
                    "source": pair[0],
                    "target": pair[1],
                    "map": kind,
                    "method": method,
                    **{f"p{k}": v for k, v in scores.precision_at.items()},
                    "mrr": scores.mrr,
                    "coverage": scores.coverage,
                    "words": scores.words,
                    "candidates": candidates,
                }
            )
    return results


def _report(workdir, rows, means) -> None:
    header = ["map", "method", "P@1", "P@5", "P@10", "MRR", "coverage"]
    lines = [[*key, *(found[m] for m in _MEASURES)] for key, found in means.items()]
    print(tables.format_table(header, lines))
    plots.save_heatmap(
        workdir / "methods.png",
        list(retrieval.MAPS),
        list(retrieval.METHODS),
        np.array(
            [[means[k, m]["p1"] for m in retrieval.METHODS] for k in retrieval.MAPS]
        ),
        title=f"{common.MODEL.value.rstrip('/').split('/')[-1]}: mean P@1",
        row_label="map",
        column_label="retrieval",
        limits=(0, 1),
    )
    best = max(means, key=lambda key: means[key]["p1"])
    chosen = [r for r in rows if _key(r) == best]
    plots.save_bars(
        workdir / "pairs.png",
        [f"{r['source']} → {r['target']}" for r in chosen],
        [r["p1"] for r in chosen],
        title=f"P@1 by {best[1]}, map: {best[0]}",
        limits=(0, 1),
    )


if __name__ == "__main__":
    common.launch(main)
