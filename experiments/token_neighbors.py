"""Who are the nearest neighbours of every token, across writing systems?

    python -m experiments.token_neighbors --model=google/mt5-base --workdir=runs/mt5

Default: the 50 nearest neighbours of every token of the demo model, by the cosine of
the input embeddings, in its own full vocabulary, and how many of them are translations
in the demo's held-out dictionary; under a minute on 2 CPU cores.

Expect: 7.65 categories (standard deviation 1.17) among 51 rows on the demo model, whose
first weights bring scripts together as mT5's training does; 89% of 736 words have a
translation there (random lists 1.6%). In the paper 7.61 for mT5-XL, 1.64 for XLM-R-XL.

The protocol is that of Hyperpolyglot LLMs (Wen-Yi and Mimno, 2023,
https://arxiv.org/abs/2311.18034, Figures 4, 5, 6 and 9). It counts Unicode categories
(the first word of a letter's name; S, N, P, M, C, Z for the rest) among 51 rows, the
token itself and its 50 neighbours, and averages the category-to-category counts over
those tokens that have such a neighbour at all. `--conventions=clean` counts writing
systems (Unicode's Script property) among the neighbours alone and averages over all
tokens. The paper's numbers, from a sample of 1% (`--sample=0.01`): 7.61 categories
(standard deviation 4.24) for mT5-XL, 1.64 (0.98) for XLM-R-XL; 6.8 to 8.8 in every
decile of frequency for mT5-XL. The paper gives no translation rate.

The same command goes on with a run that was interrupted. With `--distributed` the
processes of a job share the work, and each saves what it has finished; where some of
them end early, the same job goes on from there.
"""

import hashlib
import itertools
import pathlib
import textwrap

import numpy as np
from absl import flags

from jaxling import (
    checkpoints,
    demo,
    dictionaries,
    kernels,
    neighborhoods,
    sweeps,
    vocabulary,
    writing_systems,
)
from jaxling.report import pages, plots, tables

from . import common

_K = 50  # the paper's
_SAMPLE = flags.DEFINE_float(
    "sample", None, "Share of the tokens to look at; all of them when not given.", 0, 1
)
_CONVENTIONS = flags.DEFINE_enum(
    "conventions",
    "paper",
    ["paper", "clean"],
    "paper: Unicode categories, a token is among its own neighbours, means leave zeros"
    " out. clean: writing systems, neighbours alone, means over all tokens.",
)
_DICTIONARY = flags.DEFINE_list(
    "dictionary",
    None,
    "Files of word pairs in the format of MUSE, for the rate of translations; the demo"
    " models bring their own.",
)
_FREQUENCIES = flags.DEFINE_string(
    "frequencies", None, "File with lines of token, tab, count; for the deciles."
)
_PANEL = flags.DEFINE_integer(
    "panel", sweeps.PANEL, "Rows brought in together; each such step is saved.", 1
)


def main(argv: list[str]) -> None:
    """Finds the neighbours, describes them, leaves tables, pictures and the page."""
    del argv
    number, processes = common.join_processes()
    model, k = common.MODEL.value, common.K.value or _K
    words = vocabulary.load_vocabulary(model, common.REVISION.value)
    checkpoint = checkpoints.open_checkpoint(model, common.REVISION.value)
    name = checkpoint.input_embeddings(common.TENSOR.value)
    # Rows beyond the last token belong to nobody; an id may lack a token, or a row.
    count = min(len(words.tokens), checkpoint.shape(name)[0])
    absent = np.flatnonzero(~words.present[:count])
    if common.K.value and k >= count:
        raise ValueError(
            f"--k must be less than the {count:,} tokens of {model}; got {k:,}."
        )
    queries = _queries(words, count)
    dictionary = _dictionary(model)
    frequencies = None
    if _FREQUENCIES.value:
        frequencies = dictionaries.read_frequencies(
            _FREQUENCIES.value, words.strings[:count]
        )
    digest = checkpoint.digest(name)
    run = common.begin(
        "token_neighbors",
        {
            "tensor": {"name": name, "sha256": digest},
            "tokens": _digest("\n".join(words.strings)),
            "queries": _digest(queries.tobytes()),
            "dictionary": dictionary and _digest(repr(dictionary)),
            "frequencies": frequencies is not None and _digest(frequencies.tobytes()),
            # What is compared here is refused before the record is touched.
            "computed_with": sweeps.environment(),
        },
        write=number == 0,
    )

    matrix = checkpoint.read(name, rows=slice(count))
    undirected = sweeps.invalid_rows(matrix)
    if len(undirected) == count:
        raise ValueError(
            f"No row of {name} in {model} has a direction: all are zero, NaN or"
            " infinite."
        )
    near = np.setdiff1d(np.flatnonzero(words.present[:count]), undirected)
    if len(near) < 2 or not np.isin(queries, near).any():
        raise ValueError(
            f"None of the {len(queries)} tokens to look at can have a neighbour: it"
            f" takes a row of {name} in {model} that is not zero, NaN or infinite, and"
            f" that of another token; {len(near)} of all tokens have one."
        )
    every = len(queries) == count - len(absent)
    swept = sweeps.sweep_neighbors(
        matrix,
        k=k,
        rows=None if every else queries,
        skip=absent if len(absent) else None,
        path=run.workdir / "sweep.state",
        matrix_identity=digest,
        panel=_PANEL.value,
        share=(number, processes),
        progress=number == 0,
    )
    swept = sweeps.joined(swept)
    if number:
        return
    lines = queries if every else slice(None)
    ids, distances = swept.indices[lines], 1 - swept.scores[lines]

    tokens = words.tokens[:count]
    labels = {
        "category": writing_systems.unicode_categories(words.strings[:count]),
        "writing_system": writing_systems.writing_systems(
            tokens, words.special[:count]
        ),
    }
    occurrence = np.asarray(kernels.k_occurrence(ids, count))
    summary = _describe(
        run.workdir, tokens, labels, queries, ids, occurrence, dictionary, frequencies
    )
    starts = neighborhoods.striking(
        ids, distances, queries, tokens, labels["writing_system"]
    )
    summary["tensor"] = name
    summary["without_direction"] = [tokens[i] for i in undirected if words.present[i]]
    _save_table(run.workdir, tokens, labels, queries, ids, distances, occurrence)
    about = (
        f"{len(queries):,} of the {count - len(absent):,} tokens of {model}, each with"
        f" its {k} nearest among all of them by the cosine of {name}."
    )
    pages.save_browser(
        run.workdir / "browser.html",
        tokens,
        labels["writing_system"],
        ids,
        distances,
        rows=None if len(queries) == count else queries,
        starts=starts,
        title=f"Neighbours of every token: {model.rstrip('/').split('/')[-1]}",
        about=about,
    )
    measured = {
        "bands": swept.bands,
        "resumed": swept.resumed,
        "scores_per_second": round(swept.rate) if swept.rate else None,
    }
    common.finish(run, summary, measured)
    print(textwrap.fill(about, 88, break_on_hyphens=False) + "\n")
    _show(tokens, labels["writing_system"], queries, ids, starts, summary)
    print(
        f"\nWalk from neighbour to neighbour: {run.workdir / 'browser.html'} (opens in"
        f" any browser)\nAll lists: {run.workdir / 'neighbors.parquet'}; all numbers:"
        f" {run.workdir / 'summary.json'}; pictures: {run.workdir}/*.png"
    )


def _digest(content: str | bytes) -> str:
    if isinstance(content, str):
        content = content.encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()


def _queries(words: vocabulary.Vocabulary, count: int) -> np.ndarray:
    """Ids of the tokens to look at: present, shared, sampled."""
    others = [vocabulary.load_vocabulary(name) for name in common.SHARED_WITH.value]
    ids = np.flatnonzero(words.present[:count])
    if others:
        ids = np.sort(vocabulary.shared_tokens(words, *others)[0])
        ids = ids[ids < count]
    if _SAMPLE.value is not None:
        size = max(1, round(_SAMPLE.value * len(ids)))
        rng = np.random.default_rng(common.SEED.value)
        ids = np.sort(rng.choice(ids, min(size, len(ids)), replace=False))
    if not len(ids):
        raise ValueError(
            f"No token of {common.MODEL.value} is left to look at: none is shared with"
            f" {', '.join(common.SHARED_WITH.value)}."
        )
    return ids


def _dictionary(model: str) -> list[tuple[str, str]] | None:
    if _DICTIONARY.value:
        read = map(dictionaries.read_dictionary, _DICTIONARY.value)
        return list(itertools.chain.from_iterable(read))
    if model not in checkpoints.sources.BUILT_IN:
        return None
    languages = itertools.combinations(demo.LANGUAGES, 2)
    return [pair for two in languages for pair in demo.lexicon(*two, "test")]


def _describe(
    workdir: pathlib.Path,
    tokens: list[str],
    labels: dict[str, list[str]],
    queries: np.ndarray,
    ids: np.ndarray,
    occurrence: np.ndarray,
    dictionary: list[tuple[str, str]] | None,
    frequencies: np.ndarray | None,
) -> dict:
    """The summary; draws the pictures on the way."""
    paper = _CONVENTIONS.value == "paper"
    chosen = "category" if paper else "writing_system"
    plural = {"category": "categories", "writing_system": "writing systems"}
    rows = neighborhoods.with_self(ids, queries) if paper else ids
    coded = {kind: neighborhoods.encode(column) for kind, column in labels.items()}
    distinct = {
        kind: neighborhoods.distinct_labels(rows, column)
        for kind, column in coded.items()
    }
    summary = {
        "tokens": len(tokens),
        "queries": len(queries),
        "k": ids.shape[1],
        "counted": "the token and its neighbours" if paper else "neighbours",
    }
    for kind, values in distinct.items():
        spread = neighborhoods.spread(values)
        summary[plural[kind].replace(" ", "_")] = {
            "mean": spread.mean,
            "std": spread.std,
            "histogram": spread.histogram.tolist(),
        }
    plots.save_histogram(
        workdir / "diversity.png",
        [plural[chosen]],
        [distinct[chosen]],
        title=f"Different {plural[chosen]} among the neighbours of a token",
        value_label=plural[chosen],
        count_label="tokens",
    )

    matrix = neighborhoods.label_matrix(rows, queries, coded[chosen])
    means = matrix.mean_where_present if paper else matrix.mean
    summary["matrix"] = {
        "names": matrix.names,
        "tokens": matrix.tokens.tolist(),
        "mean_where_present" if paper else "mean": means.tolist(),
    }
    order = np.argsort(-matrix.tokens, kind="stable")
    order = order[matrix.tokens[order] > 0][:16]
    names = [matrix.names[i] for i in order]
    plots.save_heatmap(
        workdir / "matrix.png",
        [f"{matrix.names[i]} ({matrix.tokens[i]:,})" for i in order],
        names,
        means[np.ix_(order, order)],
        title=f"Mean number of neighbours of each {chosen.replace('_', ' ')}"
        + (", where there are any" if paper else ""),
        row_label="token",
        column_label="neighbours",
        value_format="{:.1f}",
    )

    hubs = neighborhoods.hubness(occurrence)
    summary["hubness"] = hubs._asdict() | {
        "hubs": [[int(i), tokens[i], int(occurrence[i])] for i in hubs.hubs]
    }
    plots.save_bars(
        workdir / "hubs.png",
        [tokens[i] for i in hubs.hubs],
        occurrence[hubs.hubs],
        title=f"The tokens in most lists of {ids.shape[1]} neighbours",
        value_label="lists",
        value_format="{:,.0f}",
    )
    if frequencies is not None:
        decile = neighborhoods.frequency_deciles(frequencies)[queries] - 1
        groups = neighborhoods.group_means(decile, distinct[chosen], 10)
        summary["deciles"] = groups._asdict()
        plots.save_bars(
            workdir / "deciles.png",
            ["rarest", *(str(i) for i in range(2, 10)), "most frequent"],
            groups.mean,
            title=f"Mean number of {plural[chosen]} by decile of frequency",
            value_label=plural[chosen],
        )
    if dictionary is not None:
        found = neighborhoods.translations(ids, queries, tokens, dictionary)
        summary["translations"] = {
            "tokens": len(found.rows),
            "rate": found.rate,
            "rate_of_random_lists": found.chance,
            "rate_at": {
                k: found.rate_at(k) for k in (1, 5, 10, 20) if k <= ids.shape[1]
            },
        }
    return summary


def _save_table(workdir, tokens, labels, queries, ids, distances, occurrence) -> None:
    """One line for every id, so that the ids of neighbours are numbers of lines."""
    k = ids.shape[1]
    all_ids = np.full((len(tokens), k), -1, np.int32)
    all_distances = np.zeros((len(tokens), k), np.float32)
    all_ids[queries], all_distances[queries] = ids, distances
    tables.write_parquet(
        workdir / "neighbors.parquet",
        {
            "id": np.arange(len(tokens)),
            "token": tokens,
            **labels,
            "k_occurrence": occurrence,
            "neighbors": tables.neighbor_column(all_ids, all_distances),
        },
    )


def _show(tokens, systems, queries, ids, starts, summary) -> None:
    """Prints the first lists and the main numbers."""
    place = {int(query): line for line, query in enumerate(queries)}
    rows = [
        [
            tokens[start],
            systems[start],
            tables.joined([tokens[i] for i in ids[place[start]] if i >= 0], 70),
        ]
        for start in starts
    ]
    print(tables.format_table(["token", "writing system", "nearest first"], rows))
    print()
    numbers = []
    for kind in ("categories", "writing_systems"):
        title = f"{kind.replace('_', ' ')} among {summary['counted']}"
        numbers.append([title, summary[kind]["mean"], f"sd {summary[kind]['std']:.3f}"])
    hubs = summary["hubness"]
    # The lists of a small sample have no room for all tokens.
    if summary["queries"] * summary["k"] >= summary["tokens"]:
        share = hubs["antihub_occurrence"]
        numbers.append(["share of tokens in no list", share, "antihubs"])
    (_, token, most), *_ = hubs["hubs"]
    numbers.append(["lists that hold the most frequent neighbour", most, token])
    if "translations" in summary:
        rate = summary["translations"]
        numbers.append(
            [
                f"of {rate['tokens']:,} tokens have a translation among them",
                rate["rate"],
                f"random lists {rate['rate_of_random_lists']:.3f}"
                if rate["tokens"]
                else "none is in the dictionary",
            ]
        )
    print(tables.format_table(["", "value", ""], numbers))


if __name__ == "__main__":
    common.launch(main)
