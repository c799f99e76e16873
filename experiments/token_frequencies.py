"""How often does each token of a vocabulary occur in a corpus?

    python -m experiments.token_frequencies --model=google/mt5-base \
        --corpus=mc4/*.json.gz --workdir=runs/frequencies

Default: the demo model's tokenizer over the training verses of its ten languages, a
verse a document.

Expect: 1,695,356 tokens in 52,503 verses, 345 of 12,288 tokens never; 5 s on 2 cores.

`frequencies.tsv` has lines of token, tab, count: what `token_neighbors --frequencies`
reads for its deciles (Hyperpolyglot LLMs, Wen-Yi and Mimno, 2023,
https://arxiv.org/abs/2311.18034, Figure 9; their counts are of mC4).
`frequencies.parquet` has ids, counts and numbers of documents. The tokenizer adds
nothing at the ends of a text; a document may also be a list of token ids. A corpus is
read as a stream, in any of the formats of `jaxling.corpus`, by all processors; the same
command goes on with a run that was killed.
"""

import numpy as np

from jaxling import corpus, demo, vocabulary, writing_systems
from jaxling.report import plots, tables

from . import common


def main(argv: list[str]) -> None:
    """Counts, and leaves the frequencies, a table and pictures."""
    del argv
    name, revision = common.MODEL.value, common.REVISION.value
    words = vocabulary.load_vocabulary(name, revision)
    tokenizer = vocabulary.load_tokenizer(name, revision)
    size = max(len(words.tokens), tokenizer.get_vocab_size())
    plan = corpus.Plan(tokens=True, tokenizer=tokenizer, vocabulary_size=size)
    run = common.begin("token_frequencies", {"vocabulary": size})
    verses = demo.verses("train").text
    counts = common.count(
        plan, run, (" " + verse for column in verses.values() for verse in column)
    )
    often = counts.token_occurrences
    named = words.tokens + [""] * (size - len(words.tokens))
    systems = writing_systems.writing_systems(named)
    left_out = _write(run.workdir / "frequencies.tsv", words.strings, often)
    tables.write_parquet(
        run.workdir / "frequencies.parquet",
        {
            "id": np.arange(size),
            "token": named,
            "writing_system": systems,
            "count": often,
            "documents": counts.token_documents,
        },
    )
    total = int(often.sum())
    by_system: dict[str, int] = {}
    for system, count in zip(systems, often.tolist()):
        by_system[system] = by_system.get(system, 0) + count
    shares = sorted(by_system.items(), key=lambda item: -item[1])
    plots.save_bars(
        run.workdir / "writing_systems.png",
        [system for system, _ in shares[:20]],
        [count / max(total, 1) for _, count in shares[:20]],
        title=f"Writing systems of {total:,} tokens",
        value_label="share of all occurrences",
    )
    order = np.argsort(-often, kind="stable")
    plots.save_bars(
        run.workdir / "tokens.png",
        [named[i] for i in order[:30]],
        often[order[:30]],
        title="The most frequent tokens",
        value_label="occurrences",
        value_format="{:,.0f}",
    )
    never = int((often[: len(words.tokens)][words.present] == 0).sum())
    common.finish(
        run,
        {
            "documents": counts.documents,
            "characters": counts.characters,
            "tokens": total,
            "vocabulary": len(words.tokens),
            "never": never,
            "most": [[int(i), named[i], int(often[i])] for i in order[:100]],
            "writing_systems": dict(shares),
            "left_out": left_out,
            "damage": counts.damage._asdict(),
        },
    )
    print(
        tables.format_table(
            ["token", "writing system", "occurrences", "documents"],
            [
                [named[i], systems[i], int(often[i]), int(counts.token_documents[i])]
                for i in order[:10]
            ],
        )
    )
    print(
        f"\n{total:,} tokens in {counts.documents:,} documents; {never:,} of"
        f" {len(words.tokens):,} tokens never occur.\nCounts:"
        f" {run.workdir / 'frequencies.tsv'}; pictures beside it."
    )


def _write(path, strings: list[str], counts: np.ndarray) -> list[str]:
    """Lines of token, tab, count; gives back the tokens that no line can hold."""
    left_out = []
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for token, count in zip(strings, counts.tolist()):
            if "\n" in token:
                left_out.append(token)
            elif token:
                file.write(f"{token}\t{count}\n")
    return left_out


if __name__ == "__main__":
    common.launch(main)
