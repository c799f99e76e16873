"""Which tokens lead from a word to its translation, by the corpus and in the model?

    python -m experiments.semantic_pivots --model=allenai/OLMo-7B-0424-hf \
        --task=runs/words/task.json --corpus=dolma/*.json.gz --workdir=runs/pivots

Default: the demo model, 12 held-out words for each of 20 ordered pairs of languages,
and 3 million characters of the verses and verse pairs that it learned from.

Expect: 21 pivots for an item after both filters, of 65 before; mean mass of source
tokens is highest in the first of four layers (0.094), of pivots in the second (0.044,
and 0.008 of other words' pivots), of target tokens in the last (0.088); R² of the Score
is 0.08 by the pair's count, 0.08 by its pivots and 0.10 by both. On clones, where the
truth is known, 0.99 of the best two are the true two, and of the best 100 the filter
keeps 0.996 of those and few enough others that 0.18 are true; a minute on two cores.

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385: a token's score is
by how much it is commoner beside the source word than anywhere, or beside the target
word, whichever is less; the 100 best are kept, and then those with a semantic relation
to both words. That filter was not published. Here it is `--minimum_association`
(normalised pointwise mutual information over documents) and `--minimum_similarity`
(cosine of embeddings), and each step is reported. The paper expects probability to move
from source to pivot to target tokens, layer by layer, where the answer begins; the same
is measured here, beside the pivots of other words of the same languages, as a control;
and, as its code does, the Score is fitted by ln(documents with both words) and by the
pivots' company, the sum of ln(documents with a pivot and the word it is rarer beside).

Where there is a truth the finder is checked against it: King James verses in a language
and its clone that never meet in a document, each with two further clones that they
share, which are then the only true pivots. `--testbed_documents=0` leaves that out.
"""

import hashlib
import itertools
from typing import Any

import numpy as np
import tqdm
from absl import flags

from jaxling import (
    behaviours,
    cloned_languages,
    corpus,
    demo,
    models,
    vocabulary,
    word_translation,
)
from jaxling.corpus import pivots, predictions, selection
from jaxling.demo import pool, text
from jaxling.report import plots, tables

from . import common

_CHARACTERS = flags.DEFINE_integer(
    "demo_characters", 3_000_000, "Of the built-in corpus.", 1
)
_ASSOCIATION = flags.DEFINE_float(
    "minimum_association", 0.2, "Of a pivot with either word.", -1, 1
)
_SIMILARITY = flags.DEFINE_float(
    "minimum_similarity", 0.1, "Cosine of a pivot with either word.", -1, 1
)
_TESTBED = flags.DEFINE_integer(
    "testbed_documents", 20_000, "Documents of cloned languages; 0 for none.", 0
)
_K = 100
_BRIDGES, _TESTBED_WORDS = 2, 500
_BATCH = 60


def main(argv: list[str]) -> None:
    """Counts, finds and filters pivots, reads the layers, and checks on clones."""
    del argv
    name, revision, k = common.MODEL.value, common.REVISION.value, common.K.value or _K
    model = models.load(name, revision=revision)
    tokenizer = vocabulary.load_tokenizer(name, revision)
    words = vocabulary.load_vocabulary(name, revision)
    task = common.translation_task(model, tokenizer)
    digest = hashlib.sha256(repr(task).encode(errors="surrogatepass")).hexdigest()
    run = common.begin("semantic_pivots", {"task": digest})
    word_translation.save_task(task, run.workdir / "task.json")
    counts, term = _count(run, task, tokenizer, len(model.embedding[...]))
    own = [_tokens(tokenizer, item.word, item.answer) for item in task.items]
    sources = [term[item.word] for item in task.items]
    targets = [term[item.answer] for item in task.items]
    found = pivots.find(
        counts,
        sources,
        targets,
        k=k,
        excluded=[{*source, *target} for source, target in own],
    )
    similarity = pivots.similarity(
        np.asarray(model.embedding[...], np.float32), found.pivots, *zip(*own)
    )
    steps = _filtered(found, similarity)
    other = _of_others(task, steps[-1][1].sets(), own)
    prompts: dict[str, Any] = dict(
        shots=common.SHOTS.value,
        seed=common.SEED.value,
        batch=_BATCH,
        language_tokens=common.entries(common.LANGUAGE_TOKENS.value, "language_tokens")
        or None,
        progress=lambda parts: tqdm.tqdm(parts, unit="batch", disable=None),
    )
    masses = {}
    for label, sets in [*((n, p.sets()) for n, p in steps), ("control", other)]:
        masses[label] = behaviours.trace(model, tokenizer, task, pivots=sets, **prompts)
    scores = word_translation.score_task(
        model, tokenizer, task, draws=common.DRAWS.value, **prompts
    ).score
    variables = {
        "pair": predictions.log_counts(
            corpus.pair_counts(counts.document_pairs, sources, targets)
        ),
        "pivots": pivots.company(found, steps[-1][1]),
    }
    summary = {
        "documents": counts.documents,
        "damage": counts.damage._asdict(),
        "words_in_no_document": int((found.documents == 0).any(1).sum()),
        "fits_of_score": _fits(variables, scores),
        **_masses(run.workdir, masses, [label for label, _ in steps]),
    }
    summary["steps"] = {
        label: {
            "pivots": sum(map(len, chosen.sets())),
            "items_with_any": sum(map(bool, chosen.sets())),
        }
        for label, chosen in steps
    }
    measured = {"score": scores, **variables}
    _save(run.workdir, task, measured, found, similarity, steps, words)
    if _TESTBED.value:
        summary["testbed"] = _testbed(k)
    common.finish(run, summary)
    _show(task, steps, words, summary, run.workdir)


def _count(run, task, tokenizer, size):
    """Counts of all words of the task beside all tokens, and each word's term."""
    asked = list(
        dict.fromkeys(word for item in task.items for word in (item.word, item.answer))
    )
    if common.MATCH_TOKENS.value:
        terms = corpus.token_terms(asked, tokenizer)
    else:
        terms = corpus.surface_terms(asked)
    plan = corpus.Plan(
        terms,
        term_tokens=True,
        tokenizer=tokenizer,
        vocabulary_size=size,
    )
    drawn = pool.labelled_verses(
        demo.verses("train"), characters=_CHARACTERS.value, seed=common.SEED.value
    )
    counts = common.count(plan, run, (record.text for record in drawn))
    return counts, {word: i for i, word in enumerate(asked)}


def _tokens(tokenizer, word: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of the two words, each with a space before it."""
    coded = tokenizer.encode_batch([f" {word}", f" {answer}"], add_special_tokens=False)
    return coded[0].ids, coded[1].ids


def _filtered(found: pivots.Found, similarity: np.ndarray):
    """The pivots after each step, in order, with its name."""
    listed, association = found.pivots, found.association
    related = pivots.keep(listed, association, _ASSOCIATION.value)
    # The relation of what is left, in its new places.
    alike = similarity.copy()
    alike[~(association >= _ASSOCIATION.value)] = -np.inf
    both = pivots.keep(listed, alike, _SIMILARITY.value)
    return [
        ("best by score", listed),
        ("and associated", related),
        ("and similar", both),
    ]


def _of_others(task, sets, own) -> list[list[int]]:
    """The pivots of the next item of the same languages, without the item's own."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, item in enumerate(task.items):
        groups.setdefault(item[:2], []).append(i)
    other: list[list[int]] = [[] for _ in task.items]
    for group in groups.values():
        for i, j in zip(group, [*group[1:], group[0]]):
            mine = {*sets[i], *own[i][0], *own[i][1]}
            other[i] = [token for token in sets[j] if token not in mine]
    return other


def _fits(variables, scores: np.ndarray) -> dict:
    """What a pair's own count and its pivots explain of the Scores, and both do."""
    chosen = {name: {name: values} for name, values in variables.items()}
    found = {}
    for name, own in (chosen | {"both": variables}).items():
        fitted = predictions.fit(own, scores, seed=common.SEED.value)
        found[name] = {
            "slopes": {k: slope._asdict() for k, slope in fitted.slopes.items()},
            "explained": fitted.explained._asdict(),
        }
    return found


def _masses(workdir, traces, labels) -> dict:
    """Mean mass by layer, over the items with pivots after every step."""
    whole = [traces[label].pivot_mass for label in (*labels, "control")]
    kept = np.isfinite(np.stack(whole)).all((0, 1))
    if not kept.any():
        return {"items_read": 0}
    any_trace = traces[labels[0]]
    curves = {
        "source": any_trace.source_mass,
        **{f"pivots: {label}": traces[label].pivot_mass for label in labels},
        "pivots of other words": traces["control"].pivot_mass,
        "target": any_trace.answer_mass,
    }
    means = {label: mass[:, kept].mean(1) for label, mass in curves.items()}
    plots.save_curves(
        workdir / "mass.png",
        list(means),
        list(means.values()),
        title=f"Probability where the answer begins, {kept.sum():,} items",
        x_label="layer",
        value_label="mean probability of the tokens",
    )
    return {
        "items_read": int(kept.sum()),
        "mass_by_layer": means,
        "peak_layer": {label: int(np.argmax(mean)) for label, mean in means.items()},
    }


def _save(workdir, task, measured, found, similarity, steps, words) -> None:
    """One row for every item, its pivots best first in lists."""
    sets = [chosen.sets() for _, chosen in steps]
    held = [len(own) for own in sets[0]]

    def lists(values):
        return [row[:n].tolist() for row, n in zip(values, held)]

    tables.write_parquet(
        workdir / "items.parquet",
        {
            **{
                field: [getattr(item, field) for item in task.items]
                for field in ("source", "target", "word", "answer")
            },
            "word_documents": found.documents[:, 0],
            "answer_documents": found.documents[:, 1],
            "translation_score": measured["score"],
            "ln_count": measured["pair"],
            "pivot_company": measured["pivots"],
            "pivot_token_id": sets[0],
            "pivot": [[_spelled(words, t) for t in own] for own in sets[0]],
            "score": lists(found.pivots.scores),
            "association": lists(found.association),
            "similarity": lists(similarity),
            "filtered_token_id": sets[-1],
        },
    )


def _spelled(words, token: int) -> str:
    return words.tokens[token] if token < len(words.tokens) else ""


def _testbed(k: int) -> dict:
    """Precision and recall where the true pivots are known."""
    size = _TESTBED_WORDS
    verses = [
        [word.lower() for word in text.words(verse)]
        for verse in demo.verses("train").text["eng"]
        if verse
    ]
    drawn = cloned_languages.bridged_documents(
        cloned_languages.number_words(verses, size),
        size,
        bridges=_BRIDGES,
        parallel_share=0.5,
        seed=common.SEED.value,
    )
    first = cloned_languages.SPECIAL
    asked = np.arange(first, first + 2 * size)
    counts = corpus.count_documents(
        (np.array(d.tokens) for d in itertools.islice(drawn, _TESTBED.value)),
        corpus.Plan(
            selection.token_nodes(asked),
            pairs=False,
            term_tokens=True,
            vocabulary_size=first + (2 + _BRIDGES) * size,
        ),
    )
    truth = [[t + (2 + i) * size for i in range(_BRIDGES)] for t in asked[:size]]
    own = [{t, t + size, *range(first)} for t in asked[:size]]
    items = range(size), range(size, 2 * size)
    exact = pivots.find(counts, *items, k=_BRIDGES, excluded=own)
    many = pivots.find(counts, *items, k=k, excluded=own)
    related = pivots.keep(many.pivots, many.association, _ASSOCIATION.value)
    return {
        label: {
            **pivots.agreement(chosen, truth)._asdict(),
            "pivots": sum(map(len, chosen.sets())),
        }
        for label, chosen in (
            (f"best {_BRIDGES} by score", exact.pivots),
            (f"best {k} by score", many.pivots),
            ("and associated", related),
        )
    }


def _show(task, steps, words, summary, workdir) -> None:
    shown = [row for row, own in enumerate(steps[-1][1].sets()) if own][:8]
    print(
        tables.format_table(
            ["word", "answer", "pivots after every step"],
            [
                [
                    f"{task.items[i].source}: {task.items[i].word}",
                    f"{task.items[i].target}: {task.items[i].answer}",
                    tables.joined(
                        [_spelled(words, t) for t in steps[-1][1].sets()[i]], 50
                    ),
                ]
                for i in shown
            ],
        )
    )
    print()
    print(
        tables.format_table(
            ["step", "pivots", "items with any"],
            [[label, *values.values()] for label, values in summary["steps"].items()],
        )
    )
    if summary["items_read"]:
        layers = len(summary["mass_by_layer"]["source"])
        print()
        print(
            tables.format_table(
                ["mass by layer", *map(str, range(layers)), "highest at"],
                [
                    [label, *mean.tolist(), summary["peak_layer"][label]]
                    for label, mean in summary["mass_by_layer"].items()
                ],
                digits=4,
            )
        )
    print()
    print(
        tables.format_table(
            ["linear fit of the Score", "R²", "95%", "slopes"],
            [
                [
                    {
                        "pair": "ln(count of both words)",
                        "pivots": "pivots' company",
                    }.get(label, label),
                    fitted["explained"]["value"],
                    "{low:.3f} – {high:.3f}".format(**fitted["explained"]),
                    ", ".join(f"{s['value']:.4f}" for s in fitted["slopes"].values()),
                ]
                for label, fitted in summary["fits_of_score"].items()
            ],
        )
    )
    if "testbed" in summary:
        print()
        print(
            tables.format_table(
                ["cloned languages", "precision", "recall", "best is true", "any", "n"],
                [[label, *row.values()] for label, row in summary["testbed"].items()],
            )
        )
    print(
        f"\n{summary['documents']:,} documents; {summary['words_in_no_document']} of"
        f" {len(task.items)} items have a word in none of them. items.parquet and"
        f" mass.png are in {workdir}."
    )


if __name__ == "__main__":
    common.launch(main)
