"""Pools: tokenised documents of known languages, with the scores to choose them by.

A pool is a directory: `tokens`, a token file of `jaxling.training`; `languages.json`,
the language of every document, written last; and `counts`, of its pairs of tokens.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxling.training import packing

from . import selection
from .cooccurrence import Plan, count_documents
from .readers import find_shards
from .runs import count_corpus


class Pool(NamedTuple):
    """Documents to choose from, and what `selection.arm` chooses by."""

    documents: list[np.ndarray]
    lengths: np.ndarray
    languages: list[str]
    pivots: np.ndarray
    pivot_score: np.ndarray
    joined_score: np.ndarray


def write_pool(
    folder: str | os.PathLike,
    records: Iterable[tuple[str | np.ndarray, str]],
    tokenizer: Any,
    *,
    vocabulary_size: int,
    end_token: int | None = None,
) -> None:
    """Tokenises documents, one at a time; nothing is done where the pool is complete.

    Args:
      folder: where the pool is to be.
      records: documents (texts, or token ids) and their languages; those without a
        token are left out.
      tokenizer: a `tokenizers.Tokenizer`.
      vocabulary_size: of the model.
      end_token: is put behind each document.

    Raises:
      ValueError: no document has a token, or one is outside of the vocabulary.
      OSError: the pool cannot be written.
    """
    folder = pathlib.Path(folder)
    if (folder / "languages.json").exists():
        return
    languages: list[str] = []
    end = [] if end_token is None else [end_token]

    def tokenised():
        for document, language in records:
            ids = document
            if isinstance(document, str):
                ids = tokenizer.encode(document, add_special_tokens=False).ids
            if len(ids):
                languages.append(language)
                yield [*ids, *end]

    packing.write_tokens(
        folder / "tokens", tokenised(), vocabulary_size=vocabulary_size
    )
    partial = folder / "languages.json.partial"
    partial.write_text(json.dumps(languages) + "\n", "utf-8")
    os.replace(partial, folder / "languages.json")


def score_pool(
    folder: str | os.PathLike,
    *,
    vocabulary_size: int,
    graph_tokens: int,
    edge_documents: int,
    edge_association: float,
    pivot_tokens: int,
    excluded: Sequence[int] = (),
    processes: int | None = None,
) -> Pool:
    """Builds the graph of a pool, finds its pivots, and scores every document.

    Args:
      folder: of `write_pool`.
      vocabulary_size: of the model.
      graph_tokens: nodes, the tokens in most documents.
      edge_documents, edge_association: what an edge needs, as in `selection.graph`.
      pivot_tokens: how many tokens are pivots.
      excluded: tokens that are no nodes, such as the one that ends documents.
      processes: as in `count_corpus`.

    Raises:
      ValueError: the pool is damaged; as `selection.graph`.
      OSError: it cannot be read.
    """
    folder = pathlib.Path(folder)
    file = packing.open_tokens(folder / "tokens")
    languages = json.loads((folder / "languages.json").read_text("utf-8"))
    # A view: slices of a memory map itself are ten times as slow to make.
    tokens = np.asarray(file.tokens)
    bounds = zip(file.documents[:-1].tolist(), file.documents[1:].tolist())
    documents = [tokens[begin:end] for begin, end in bounds]
    shards = find_shards([str(file.path)], format="tokens")
    counts = count_corpus(
        shards,
        Plan(tokens=True, vocabulary_size=vocabulary_size),
        processes=processes,
        progress=False,
    ).counts
    assert counts.token_documents is not None, "the plan counts tokens"
    nodes = selection.commonest(counts.token_documents, graph_tokens, excluded=excluded)
    plan = Plan(selection.token_nodes(nodes), vocabulary_size=vocabulary_size)
    together = count_corpus(
        shards,
        plan,
        workdir=folder / "counts",
        processes=processes,
        progress=False,
    ).counts
    rows: dict[str, list[int]] = {}
    for row, language in enumerate(languages):
        rows.setdefault(language, []).append(row)
    graph = selection.graph(
        together,
        nodes,
        parts=[
            count_documents((documents[i] for i in own), plan._replace(pairs=False))
            for own in rows.values()
        ],
        documents=edge_documents,
        association=edge_association,
    )
    pivots = selection.pivot_set(graph, pivot_tokens)
    return Pool(
        documents,
        np.diff(file.documents),
        languages,
        pivots,
        selection.share_of(documents, pivots, vocabulary_size),
        selection.joined_share(documents, graph, vocabulary_size, without=pivots),
    )
