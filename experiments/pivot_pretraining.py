"""Does text rich in semantic pivots teach a model to translate better than other text?

    python -m experiments.pivot_pretraining --model=allenai/OLMo-1B-hf \
        --revision=step605000-tokens2536B --corpus=pool/*.jsonl.zst \
        --language_field=language --parallel=flores.tsv --recipe=olmo

Default: `demo` goes on training on 41 thousand tokens of verses that it has not read,
chosen in four ways, with three seeds each, at a tenth of the rate that it was trained
with; then 240 words and 144 sentences to translate.

Expect: no. Score 0.048 after `pivots`, 0.049 after `original` and `multilingual`,
0.054 after `co-occurrence` (0.062 before any of them); chrF 11.0, 11.2, 11.3 and 11.9
(11.1 before), whose differences from `pivots` all have intervals that hold 0; loss
4.445, the highest, beside 4.426 to 4.431. About 7 minutes of CPU time.

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, go on training
OLMo-1B on documents with a high share of pivot tokens. The arms, equal in tokens and
steps: `pivots`; `original`, the pool in its order; `multilingual`, drawn at random; and
`co-occurrence`, documents whose tokens otherwise often meet, with few pivots. All but
`original` have the same mix of languages. How pivots are chosen was not published: see
`jaxling.corpus.selection` and the flags, whose defaults were set by looking at which
tokens they make pivots, never by a result. The learning rate was lowered once, to a
tenth of the demo's own: at a quarter of it, the one arm that was seen lost half of its
Score.

The built-in pool is Luke, Romans and Revelation, three of the books that no demo model
read, as verses and verse pairs in the demo's own proportions, drawn anew for each seed.
Sentences and the loss are of the other four (Ephesians, Colossians, 1 Peter, Titus), of
which nothing is in the pool, nor of their example sentences; Armenian has none of them.
Words are of test concepts, in no word prompt the demo was trained on; the pool has no
word prompts either. Their verses are in the pool as any others are, for all arms alike.

Each finished arm and seed is kept in the workdir, and a killed run goes on from there.
Intervals are Student's over seeds (95%), the differences paired by seed.
"""

import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm
from absl import flags, logging

from jaxling import (
    corpus,
    demo,
    intervals,
    models,
    parallel_text,
    sentence_translation,
    training,
    vocabulary,
    word_translation,
)
from jaxling.corpus import pools, runs, selection
from jaxling.demo import pool
from jaxling.report import plots, tables

from . import common, pretrain

_LANGUAGE_FIELD = flags.DEFINE_string(
    "language_field", None, "Where a record of --corpus has its language."
)
_IDENTIFIER = flags.DEFINE_string(
    "identifier", None, "module:function that tells the language of a text."
)
_POOL_CHARACTERS = flags.DEFINE_integer(
    "pool_characters", 2_000_000, "Of the built-in pool.", 1
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each arm, from --seed on.", 1)
_MIX = flags.DEFINE_list(
    "mix", [], "language:share of the tokens; all languages alike when not given."
)
_GRAPH_TOKENS = flags.DEFINE_integer(
    "graph_tokens", 4096, "Nodes of the graph: the tokens in most documents.", 2
)
_EDGE_DOCUMENTS = flags.DEFINE_integer(
    "edge_documents", 5, "Documents with both tokens that an edge needs.", 1
)
_EDGE_ASSOCIATION = flags.DEFINE_float(
    "edge_association", 0.2, "Association an edge needs; -1: counts alone.", -1, 1
)
_PIVOT_TOKENS = flags.DEFINE_integer(
    "pivot_tokens", 300, "Pivots: the tokens with most edges.", 1
)
_SENTENCES = flags.DEFINE_integer("sentences", 8, "Of each pair of languages.", 1)
_ANSWER = flags.DEFINE_integer("answer_tokens", 64, "Longest translation.", 1)
_PROMPTS = flags.DEFINE_integer("prompts", 1, "Prompts of each word.", 1)
_BATCH = 32
_METRICS = {
    "score": "Score of words",
    "chrf": "chrF of sentences",
    "loss": "loss, nats a token",
}
_MEASURED = (*_METRICS, "first")


class _Questions(NamedTuple):
    """What every trained model is asked."""

    task: word_translation.Task
    sentences: list[sentence_translation.Sentence]
    names: dict[str, str]
    file: training.TokenFile


def main(argv: list[str]) -> None:
    """Chooses documents, trains and measures every arm with every seed, compares."""
    del argv
    if _LANGUAGE_FIELD.value and _IDENTIFIER.value:
        raise ValueError("--language_field and --identifier exclude each other.")
    if common.CORPUS.value and not (_LANGUAGE_FIELD.value or _IDENTIFIER.value):
        raise ValueError(
            "The languages of --corpus are to be known: give --language_field or"
            " --identifier."
        )
    common.refuse(["dask"], "the pool is counted by --processes.")
    # Looked at before anything long begins.
    if _IDENTIFIER.value:
        selection.load_identifier(_IDENTIFIER.value)
    _mix()
    sentence_translation.sentence_chrf([], [])
    # Each arm writes its documents in the order of its seed: one program for all.
    recipe = pretrain.recipe_of_flags(
        steps=40, learning_rate=2e-4, rates=(("^embedding$", 0.1),)
    )._replace(seed=None)
    name, revision = common.MODEL.value, common.REVISION.value
    base = models.load(name, revision=revision, dtype="float32")
    tokenizer = vocabulary.load_tokenizer(name, revision)
    task = common.translation_task(base, tokenizer)
    shards = common.shards()
    digest = hashlib.sha256(repr(task).encode(errors="surrogatepass")).hexdigest()
    run = common.begin(
        "pivot_pretraining", {"task": digest, "corpus": runs.fingerprint(shards)}
    )
    word_translation.save_task(task, run.workdir / "task.json")
    questions = _questions(run.workdir, base, tokenizer, task)
    before = _kept(
        run.workdir / "before.json",
        functools.partial(_measured, base, tokenizer, questions, recipe),
    )
    size, end = len(base.embedding[...]), _end(base)
    del base  # every arm loads its own, beside which a large one has no room
    results: dict[str, list[dict]] = {arm: [] for arm in selection.ARMS}
    seeds = range(common.SEED.value, common.SEED.value + _SEEDS.value)
    waiting = [(seed, arm) for seed in seeds for arm in selection.ARMS]
    chosen_from: dict[int, pools.Pool] = {}
    for seed, arm in tqdm.tqdm(waiting, unit="arm", disable=None):

        def trained(seed=seed, arm=arm) -> dict:
            if seed not in chosen_from:
                chosen_from.clear()
                chosen_from[seed] = _pool(
                    run.workdir, shards, tokenizer, size, end, seed
                )
            return _arm(
                run.workdir / f"{arm}-{seed}",
                chosen_from[seed],
                arm,
                seed,
                tokenizer,
                questions,
                recipe,
            )

        results[arm].append(_kept(run.workdir / f"{arm}-{seed}.json", trained))
    _report(run, before, results)


def _mix() -> dict[str, float]:
    """The shares of `--mix`; empty where it is not given."""
    given = common.entries(_MIX.value, "mix")
    try:
        return {code: float(share) for code, share in given.items()}
    except ValueError:
        raise ValueError(
            f"--mix takes language:share, a number; got {', '.join(_MIX.value)}."
        ) from None


def _kept(path: pathlib.Path, make) -> dict:
    """What `path` holds, or what `make` returns, then kept there."""
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    found = make()
    common.write_json(path, found)
    return found


def _questions(workdir, model, tokenizer, task) -> _Questions:
    """Words, and sentences that leave room for an answer, also as text."""
    if common.PARALLEL.value:
        texts = parallel_text.read_parallel(
            common.PARALLEL.value, common.LANGUAGES.value
        ).texts
    else:
        texts = pool.without_books(
            demo.verses("held_out"), pool.EVALUATED_BOOKS, keep=True
        ).text
    known = {code for code, column in texts.items() if sum(map(bool, column)) > 1}
    pairs = list(dict.fromkeys(item[:2] for item in task.items))
    pairs = [pair for pair in pairs if known.issuperset(pair)]
    if not pairs:
        raise ValueError(
            "No pair of languages of the task has sentences; these languages have:"
            f" {sorted(known)}."
        )
    room = getattr(model.spec, "length", None)

    def fits(sentence) -> bool:
        asked = tokenizer.encode(sentence_translation.prompt(sentence, task.names))
        return room is None or len(asked.ids) + _ANSWER.value <= room

    sentences = sentence_translation.build_sentences(
        texts, pairs, count=_SENTENCES.value, fits=fits
    )
    written = [
        pool.paired((task.names[s.source], task.names[s.target]), (s.text, s.answer))
        for s in sentences
    ]
    end = _end(model)
    ends = [] if end is None else [end]
    file = training.write_tokens(
        workdir / "evaluation_tokens",
        ([*coded.ids, *ends] for coded in tokenizer.encode_batch(written)),
        vocabulary_size=len(model.embedding[...]),
    )
    return _Questions(task, sentences, task.names, file)


def _end(model) -> int | None:
    """The token that ends the model's documents."""
    end = model.config.get("eos_token_id")
    return end[0] if isinstance(end, list) else end


def _records(shards, seed: int, tokenizer) -> Iterator[tuple[str | np.ndarray, str]]:
    """Documents and their languages; damage is passed over unless `--strict`.

    Raises:
      ValueError: no document can be read; a document's language cannot be told.
      OSError: a file cannot be opened.
    """
    if not shards:
        verses = pool.without_books(demo.verses("held_out"), pool.EVALUATED_BOOKS)
        for verse in pool.labelled_verses(
            verses, characters=_POOL_CHARACTERS.value, seed=seed
        ):
            yield verse.text, verse.language
        return
    damage: list[corpus.Damage] = []
    report = None if common.STRICT.value else damage.append
    read = 0
    for shard in shards:
        if _LANGUAGE_FIELD.value:
            labelled = corpus.read_labelled(shard, _LANGUAGE_FIELD.value, report)
        else:
            labelled = _identified(corpus.read_shard(shard, report), tokenizer)
        for record in labelled:
            read += 1
            yield record
    if not read:
        examples = "".join(f" The first: {d.examples[0]}." for d in damage[:1])
        raise ValueError(f"No document of --corpus could be read.{examples}")
    if damage:
        logging.warning(
            "%d records of the pool were skipped and %d mended, such as: %s",
            sum(piece.skipped for piece in damage),
            sum(piece.mended for piece in damage),
            "; ".join(damage[0].examples),
        )


def _identified(documents, tokenizer) -> Iterator[tuple[str | np.ndarray, str]]:
    identify = selection.load_identifier(_IDENTIFIER.value or "")
    for document in documents:
        text = document
        if not isinstance(text, str):
            text = tokenizer.decode(text.tolist())
        yield document, identify(text)


def _pool(workdir, shards, tokenizer, size: int, end, seed: int) -> pools.Pool:
    """A pool of files is the same for every seed, the built-in one is drawn by it."""
    folder = workdir / (f"pool-{seed}" if not shards else "pool")
    pools.write_pool(
        folder,
        _records(shards, seed, tokenizer),
        tokenizer,
        vocabulary_size=size,
        end_token=end,
    )
    return pools.score_pool(
        folder,
        vocabulary_size=size,
        graph_tokens=_GRAPH_TOKENS.value,
        edge_documents=_EDGE_DOCUMENTS.value,
        edge_association=_EDGE_ASSOCIATION.value,
        pivot_tokens=_PIVOT_TOKENS.value,
        excluded=[] if end is None else [end],
        processes=common.PROCESSES.value,
    )


def _arm(folder, of: pools.Pool, arm, seed, tokenizer, questions, recipe) -> dict:
    """Trains one arm with one seed, measures it, and leaves the folder empty."""
    chosen = selection.arm(
        arm,
        pivot_score=of.pivot_score,
        joined_score=of.joined_score,
        lengths=of.lengths,
        languages=of.languages,
        mix=_mix() or selection.equal_mix(of.languages),
        budget=recipe.steps * recipe.batch * recipe.length,
        seed=seed,
    )
    order = np.random.default_rng(seed).permutation(len(chosen))
    model = models.load(
        common.MODEL.value, revision=common.REVISION.value, dtype="float32"
    )
    file = training.write_tokens(
        folder / "tokens",
        (of.documents[i] for i in chosen[order]),
        vocabulary_size=len(model.embedding[...]),
    )
    training.train(
        model,
        file,
        recipe,
        workdir=folder,
        snapshot_every=pretrain.SNAPSHOT_EVERY.value,
        progress=False,
    )
    measured = _measured(model, tokenizer, questions, recipe)
    with open(folder / "metrics.jsonl", encoding="utf-8") as lines:
        predicted = sum(json.loads(line).get("targets", 0) for line in lines)
    # Weights and moments of every arm are large; metrics.jsonl stays.
    for part in ("snapshots", "tokens"):
        shutil.rmtree(folder / part)
    return {
        **measured,
        "documents": len(chosen),
        "tokens": int(of.lengths[chosen].sum()),
        "predicted_tokens": predicted,
        "pivot_share": float(of.pivot_score[chosen].mean()),
        "joined_share": float(of.joined_score[chosen].mean()),
        "languages": len({of.languages[i] for i in chosen}),
        "pivots": [int(token) for token in of.pivots],
    }


def _measured(model, tokenizer, questions: _Questions, recipe) -> dict[str, Any]:
    """Score and chrF, each the mean of its pairs' means, and the loss."""
    scores = word_translation.score_task(
        model,
        tokenizer,
        questions.task,
        shots=common.SHOTS.value,
        draws=_PROMPTS.value,
        seed=common.SEED.value,
        batch=_BATCH,
    )
    answers = sentence_translation.translate(
        model,
        tokenizer,
        questions.sentences,
        questions.names,
        most=_ANSWER.value,
        batch=_BATCH,
    )
    chrf = sentence_translation.sentence_chrf(
        answers, [sentence.answer for sentence in questions.sentences]
    )
    words = _by_pair(questions.task.items, scores.score)
    first = _by_pair(questions.task.items, scores.rank == 0)
    sentences = _by_pair(questions.sentences, chrf)
    return {
        "score": float(np.mean(list(words.values()))),
        "first": float(np.mean(list(first.values()))),
        "chrf": float(np.mean(list(sentences.values()))),
        "loss": training.evaluate(model, questions.file, recipe).loss,
        "score_by_pair": words,
        "chrf_by_pair": sentences,
        "answers": answers[:: max(1, len(answers) // 12)],
    }


def _by_pair(items, values: np.ndarray) -> dict[str, float]:
    pairs = [f"{item.source}-{item.target}" for item in items]
    return {
        pair: float(np.mean([v for v, p in zip(values, pairs) if p == pair]))
        for pair in dict.fromkeys(pairs)
    }


def _report(run, before, results) -> None:
    """Table, picture, record."""
    measured = {
        arm: {metric: np.array([r[metric] for r in rows]) for metric in _MEASURED}
        for arm, rows in results.items()
    }
    means = {
        arm: {metric: intervals.over_seeds(values) for metric, values in own.items()}
        for arm, own in measured.items()
    }
    gains = {
        arm: {
            metric: intervals.over_seeds(measured["pivots"][metric] - values)
            for metric, values in own.items()
        }
        for arm, own in measured.items()
        if arm != "pivots"
    }
    labels = list(means)
    plots.save_panels(
        run.workdir / "arms.png",
        labels,
        list(_METRICS.values()),
        np.array([[means[arm][m].mean for arm in labels] for m in _METRICS]),
        np.array([[_half(means[arm][m]) for arm in labels] for m in _METRICS]),
        title=f"Continued pre-training, {_SEEDS.value} seeds; dashed: before it",
        references=[before[metric] for metric in _METRICS],
    )
    flat = [
        {"arm": arm, "seed": common.SEED.value + i, **row}
        for arm, rows in results.items()
        for i, row in enumerate(rows)
    ]
    columns = ["arm", "seed", *_MEASURED, "documents", "tokens"]
    columns += ["predicted_tokens", "pivot_share", "joined_share", "languages"]
    tables.write_parquet(
        run.workdir / "arms.parquet", {c: [row[c] for row in flat] for c in columns}
    )
    common.finish(
        run,
        {
            "before": {metric: before[metric] for metric in _MEASURED},
            "arms": {
                arm: {
                    **{metric: found._asdict() for metric, found in means[arm].items()},
                    **{c: [row[c] for row in results[arm]] for c in columns[6:]},
                }
                for arm in labels
            },
            "pivots_minus": {
                arm: {metric: found._asdict() for metric, found in row.items()}
                for arm, row in gains.items()
            },
        },
    )
    _show(run, before, results, means, gains)


def _show(run, before, results, means, gains) -> None:
    headers = ["arm", "Score", "95%", "chrF", "95%", "loss", "95%", "tokens", "pivots"]
    rows: list[list[Any]] = [["before"]]
    for metric in _METRICS:
        rows[0] += [before[metric], ""]
    rows[0] += [0, ""]
    for arm, found in means.items():
        read = int(np.mean([row["predicted_tokens"] for row in results[arm]]))
        share = float(np.mean([row["pivot_share"] for row in results[arm]]))
        cells = [cell for m in _METRICS for cell in (found[m].mean, _range(found[m]))]
        rows.append([arm, *cells, read, f"{share:.1%}"])
    for arm, found in gains.items():
        cells = [cell for m in _METRICS for cell in (found[m].mean, _range(found[m]))]
        rows.append([f"pivots - {arm}", *cells, "", ""])
    print(tables.format_table(headers, rows, width=120, digits=4))
    print(
        "\nTokens are those predicted in training; 95% over seeds, differences paired."
        f" Arms, seeds and arms.png are in {run.workdir}."
    )


def _half(found: intervals.Interval) -> float:
    return found.high - found.mean


def _range(found: intervals.Interval) -> str:
    if np.isnan(found.low):
        return "–"
    return f"{found.low:.4f} – {found.high:.4f}"


if __name__ == "__main__":
    common.launch(main)
