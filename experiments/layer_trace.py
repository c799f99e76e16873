"""Does a model translate a word directly, or by way of a pivot in its middle layers?

    python -m experiments.layer_trace --model=allenai/OLMo-7B-0424-hf \
        --revision=step400000 --task=runs/words/task.json --workdir=runs/trace

Default: the demo model on 12 held-out words for each of 20 ordered pairs of its
languages, one prompt of five examples for the trace and five prompts for the Score.

Expect: 99 of 240 words through a pivot, a third of them by the token of a space alone;
the pivots' mean mass falls from 0.108 to 0.023 over the four layers, the answers' rises
from 0.005 to 0.036, and to 0.118 for words without a pivot.

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, and its released
code: the logit lens is read in every layer where the answer begins; the token that any
layer's top probability is highest for decides, and is a pivot unless the last layer
says it too or it belongs to the source word. `--rule=threshold` is an older rule of
that code, `--minimum=0.1` its filter. Items whose words share a token are skipped. The
paper's shares were not at hand; it expects mass to move from source to pivot to target.

`items.parquet` has a row for every item: words, Score, behaviour, deciding token, and
by layer the top token, its probability and the three masses. Its columns source,
target, word and answer are what corpus counts are joined on.
"""

import collections
import hashlib
import warnings
from typing import Any

import numpy as np
import tqdm
from absl import flags

from jaxling import behaviours, models, vocabulary, word_translation, writing_systems
from jaxling.report import plots, tables

from . import common

_RULE = flags.DEFINE_enum("rule", "firmest", behaviours.RULES, "What makes a pivot.")
_MINIMUM = flags.DEFINE_float(
    "minimum", None, "Probability that a deciding token must exceed (see --rule).", 0, 1
)
_BATCH = 32


def main(argv: list[str]) -> None:
    """Scores and traces the task, classifies its items, leaves tables and curves."""
    del argv
    name, revision = common.MODEL.value, common.REVISION.value
    model = models.load(name, revision=revision)
    tokenizer = vocabulary.load_tokenizer(name, revision)
    words = vocabulary.load_vocabulary(name, revision)
    task = common.translation_task(model, tokenizer)
    digest = hashlib.sha256(repr(task).encode(errors="surrogatepass")).hexdigest()
    run = common.begin("layer_trace", {"task": digest})
    word_translation.save_task(task, run.workdir / "task.json")
    prompts: dict[str, Any] = dict(
        shots=common.SHOTS.value,
        seed=common.SEED.value,
        language_tokens=common.entries(common.LANGUAGE_TOKENS.value, "language_tokens")
        or None,
        progress=lambda steps: tqdm.tqdm(steps, unit="batch", disable=None),
    )
    found = behaviours.trace(
        model,
        tokenizer,
        task,
        batch=_BATCH,
        rule=_RULE.value,
        minimum=_MINIMUM.value,
        **prompts,
    )
    scores = word_translation.score_task(
        model, tokenizer, task, draws=common.DRAWS.value, **prompts
    )
    decided = found.behaviours
    spelled = _spelled(words, decided.token)
    known = behaviours.token_languages(task, tokenizer)
    language = [_language(known.get(int(token), set())) for token in decided.token]
    script = writing_systems.writing_systems(spelled)
    _save_table(run.workdir, task, scores, found, words, spelled, language, script)

    pairs = [item[:2] for item in task.items]
    by_pair = {
        pair: behaviours.shares([k for k, p in zip(decided.kind, pairs) if p == pair])
        for pair in dict.fromkeys(pairs)
    }
    everything = behaviours.shares(decided.kind)
    pivots = [i for i, kind in enumerate(decided.kind) if kind == behaviours.PIVOT]
    curves = _curves(run.workdir, found)
    codes, table = word_translation.matrix(
        list(by_pair), [shares.pivot_share for shares in by_pair.values()]
    )
    plots.save_heatmap(
        run.workdir / "pivot_share.png",
        codes,
        codes,
        table,
        title="Share of words that are translated through a pivot",
        row_label="source",
        column_label="target",
        limits=(0, 1),
    )
    most = collections.Counter((spelled[i], language[i], script[i]) for i in pivots)
    summary = {
        "all": everything._asdict(),
        "pairs": {"-".join(pair): s._asdict() for pair, s in by_pair.items()},
        "pivot_tokens": [[*token, count] for token, count in most.most_common(100)],
        "pivot_languages": collections.Counter(language[i] for i in pivots),
        "pivot_scripts": collections.Counter(script[i] for i in pivots),
        "pivot_layers": collections.Counter(int(decided.layer[i]) for i in pivots),
        "mass_by_layer": curves,
        "mean_score": {
            kind: float(np.mean(scores.score[np.array(decided.kind) == kind]))
            for kind in sorted(set(decided.kind))
        },
    }
    common.finish(run, summary)
    _show(by_pair, everything, most, summary, run.workdir)


def _spelled(words: vocabulary.Vocabulary, tokens: np.ndarray) -> list[str]:
    """Tokens as people read them; a row of the matrix beyond the last token is "".

    An embedding may have more rows than the vocabulary has tokens.
    """
    known = len(words.tokens)
    return [words.tokens[t] if t < known else "" for t in tokens.tolist()]


def _language(codes: set[str]) -> str:
    """The language of a token, where the task's words tell."""
    if len(codes) > 1:
        return "several"
    return next(iter(codes), "unknown")


def _save_table(workdir, task, scores, found, words, spelled, language, script) -> None:
    """One row for every item; columns with a value for each layer are lists."""
    decided = found.behaviours
    fields = ("source", "target", "word", "answer")
    by_layer = {
        "top_token": found.top_tokens,
        "top_probability": found.probabilities,
        "source_mass": found.source_mass,
        "pivot_mass": found.pivot_mass,
        "answer_mass": found.answer_mass,
    }
    tables.write_parquet(
        workdir / "items.parquet",
        {
            **{
                field: [getattr(item, field) for item in task.items] for field in fields
            },
            "distractors": [list(item.distractors) for item in task.items],
            **scores._asdict(),
            "source_tokens": found.source_tokens,
            "answer_tokens": found.answer_tokens,
            "position": found.position,
            "behaviour": decided.kind,
            "deciding_layer": decided.layer,
            "deciding_token_id": decided.token,
            "deciding_token": spelled,
            "deciding_probability": decided.probability,
            "deciding_language": language,
            "deciding_script": script,
            **{key: np.ascontiguousarray(value.T) for key, value in by_layer.items()},
            "top_token_text": [_spelled(words, row) for row in found.top_tokens.T],
        },
    )


def _curves(workdir, found: behaviours.Trace) -> dict[str, dict[str, list[float]]]:
    """Mean mass of source, pivot and target tokens by layer, for either behaviour."""
    masses = {
        "source": found.source_mass,
        "target": found.answer_mass,
        "pivot": found.pivot_mass,
    }
    curves = {}
    for kind in (behaviours.PIVOT, behaviours.CO_OCCURRENCE):
        own = np.array([k == kind for k in found.behaviours.kind])
        if not own.any():
            continue
        with warnings.catch_warnings():
            # Items without a pivot have no pivot mass at all.
            warnings.simplefilter("ignore", RuntimeWarning)
            means = {part: np.nanmean(m[:, own], 1) for part, m in masses.items()}
        means = {part: mean for part, mean in means.items() if np.isfinite(mean).any()}
        curves[kind] = {part: mean.tolist() for part, mean in means.items()}
        plots.save_curves(
            workdir / f"mass_{kind}.png",
            list(means),
            list(means.values()),
            title=f"Mean probability by layer, {own.sum():,} items: {kind}",
            x_label="layer",
            value_label="probability of the word's tokens",
            limits=(0, 1.05 * max(max(mean) for mean in means.values())),
        )
    return curves


def _show(by_pair, everything, most, summary, workdir) -> None:
    print(
        tables.format_table(
            [
                "pair",
                "items",
                "co-occurrence",
                "pivot",
                "none",
                "skipped",
                "pivot share",
            ],
            [[f"{a} → {b}", *shares] for (a, b), shares in by_pair.items()],
        )
    )
    print()
    print(
        tables.format_table(
            ["pivot token", "language", "script", "items"],
            [[*token, count] for token, count in most.most_common(10)],
        )
    )
    for kind, parts in summary["mass_by_layer"].items():
        rows = [[part, *values] for part, values in parts.items()]
        headers = [f"mass, {kind}", *(str(i) for i in range(len(rows[0]) - 1))]
        print("\n" + tables.format_table(headers, rows))
    judged = everything.items - everything.skipped
    share = f" ({everything.pivot_share:.1%})" if judged else ""
    print(
        f"\n{everything.pivot:,} of {judged:,} items{share} go through a pivot;"
        f" {everything.skipped:,} skipped, as source and answer share a token.\nItems"
        f" with Scores, behaviours and traces: {workdir / 'items.parquet'}; pictures"
        " beside it."
    )


if __name__ == "__main__":
    common.launch(main)
