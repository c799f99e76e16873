"""How fast are terms counted beside a plain loop and the fastest ready-made matchers?

    python -m experiments.benchmarks.corpus

The verses of the demo in ten languages and seven scripts, `--joined` of them a
document, and `--terms` words of theirs: the most frequent of every language, or with
`--rare` such as occur at most twice. Ours counts documents with each term and with each
pair of terms (`count_documents`; with `--count_window` also pairs of places); `matching
alone` leaves pairs out. The plain loop finds words with one `re` pattern, looks them up
in a dictionary and counts pairs with `Counter`; `loop, no pairs` only looks them up.
The matchers (ahocorasick_rs, pyahocorasick, hyperscan; whichever is installed, none is
needed) find the terms in case-folded texts and do nothing with them: no boundaries of
words, no counts. All in one process on one thread, turn by turn.
"""

import collections
import importlib.util
import itertools
import re
from collections.abc import Callable

from absl import app, flags

from jaxling import corpus, demo
from jaxling.corpus import terms as units

from . import harness

TERMS = flags.DEFINE_integer("terms", 8000, "How many terms.", 1)
JOINED = flags.DEFINE_integer("joined", 20, "Verses of a document.", 1)
RARE = flags.DEFINE_bool("rare", False, "Terms that occur at most twice.")
COUNT_WINDOW = flags.DEFINE_integer("count_window", None, "Also pairs of places.", 1)
REPEATS = flags.DEFINE_integer("corpus_repeats", 3, "Turns.", 1)


def texts_and_terms() -> tuple[list[str], list[str]]:
    """The documents, and the terms by falling frequency, turn by turn of the languages.

    With `--rare` an even choice of the words that occur at most twice.
    """
    verses = demo.verses().text
    step = JOINED.value
    texts, ranked = [], []
    for column in verses.values():
        kept = [verse for verse in column if verse]
        texts += ["\n".join(kept[i : i + step]) for i in range(0, len(kept), step)]
        often = collections.Counter(
            word for verse in kept for word, _ in units.cut(verse, True)
        )
        if RARE.value:
            ranked.append([word for word, count in often.items() if count <= 2])
        else:
            ranked.append([word for word, _ in often.most_common()])
    turns = itertools.chain(*itertools.zip_longest(*ranked))
    terms = [word for word in dict.fromkeys(turns) if word]
    if RARE.value:
        terms = terms[:: max(1, len(terms) // TERMS.value)]
    return texts, terms[: TERMS.value]


def plain_loop(texts: list[str], terms: list[str], pairs: bool) -> Callable[[], tuple]:
    """What one writes without thinking of speed; a word is found once a document."""
    seen = {c for text in texts for c in text.lower()}
    letters = {c for c in seen if units.cut(c, False)}
    word = re.compile(f"[{re.escape(''.join(sorted(letters)))}]+")
    known = {term.lower(): i for i, term in enumerate(terms)}

    def count() -> tuple[int, int]:
        found: collections.Counter = collections.Counter()
        both: collections.Counter = collections.Counter()
        for text in texts:
            words = word.findall(text.lower())
            own = sorted({known[w] for w in words if w in known})
            found.update(own)
            if pairs:
                both.update(itertools.combinations(own, 2))
        return sum(found.values()), sum(both.values())

    return count


def matchers(texts: list[str], terms: list[str]) -> dict[str, Callable[[], int]]:
    """Those of the ready-made matchers that are installed: the number of matches."""
    found: dict[str, Callable[[], int]] = {}
    folded = [text.casefold() for text in texts]
    raw = [text.encode() for text in folded]
    if importlib.util.find_spec("ahocorasick_rs"):
        import ahocorasick_rs

        automaton = ahocorasick_rs.BytesAhoCorasick([term.encode() for term in terms])
        found["ahocorasick_rs"] = lambda: sum(
            len(automaton.find_matches_as_indexes(text)) for text in raw
        )
    if importlib.util.find_spec("ahocorasick"):
        import ahocorasick

        tree = ahocorasick.Automaton()
        for i, term in enumerate(terms):
            tree.add_word(term, i)
        tree.make_automaton()
        found["pyahocorasick"] = lambda: sum(
            1 for text in folded for _ in tree.iter_long(text)
        )
    if importlib.util.find_spec("hyperscan"):
        import hyperscan

        database = hyperscan.Database()
        database.compile(
            expressions=[re.escape(term).encode() for term in terms],
            ids=list(range(len(terms))),
            elements=len(terms),
            flags=[hyperscan.HS_FLAG_SINGLEMATCH] * len(terms),
        )

        def scan() -> int:
            total = [0]

            def met(*_) -> None:
                total[0] += 1

            for text in raw:
                database.scan(text, match_event_handler=met)
            return total[0]

        found["hyperscan"] = scan
    return found


def main(argv: list[str]) -> None:
    """Times all of them turn by turn, checks that counts agree, records."""
    del argv
    texts, terms = texts_and_terms()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    plan = corpus.Plan(corpus.surface_terms(terms), window=COUNT_WINDOW.value)
    alone = plan._replace(pairs=False, window=None)
    others = matchers(texts, terms)
    contestants = {
        "ours": lambda: corpus.count_documents(texts, plan),
        "ours, matching alone": lambda: corpus.count_documents(texts, alone),
        "loop": plain_loop(texts, terms, True),
        "loop, no pairs": plain_loop(texts, terms, False),
        **others,
    }
    timings, results = harness.interleaved(contestants, REPEATS.value)
    counts = results["ours"]
    agree = (
        int(counts.term_documents.sum()),
        int(counts.document_pairs.count.sum()),
    ) == results["loop"]
    speed = {name: round(megabytes / t.median, 2) for name, t in timings.items()}
    best = max((speed[name] for name in others), default=None)
    harness.record(
        "corpus",
        {
            "terms": len(terms),
            "rare": RARE.value,
            "documents": len(texts),
            "window": COUNT_WINDOW.value,
        },
        timings,
        {
            "megabytes": round(megabytes, 2),
            "megabytes_a_second": speed,
            "times_the_loop": round(speed["ours"] / speed["loop"], 2),
            "of_the_best_matcher": best and round(speed["ours"] / best, 2),
            "occurrences": int(counts.term_occurrences.sum()),
            "agrees_with_the_loop": agree,
        },
    )


if __name__ == "__main__":
    app.run(main)
