"""Exact counts over corpora of any size: who stands with whom, and how often.

    terms = surface_terms(["house", "maison", "家"])
    plan = Plan(terms, window=100)
    counts = count_documents(texts, plan)  # a stream of documents
    counts = count_corpus(find_shards(["data/*.jsonl.zst"]), plan).counts
    pair_counts(counts.document_pairs, [0], [1])  # documents with both

`find_shards` and `read_shard` stream documents; `count_shard` counts one shard and
`merge` joins two counts: everything else (processes, resuming, Dask) is these two.
"""

from .cooccurrence import Counts as Counts
from .cooccurrence import Pairs as Pairs
from .cooccurrence import Plan as Plan
from .cooccurrence import count_documents as count_documents
from .cooccurrence import count_shard as count_shard
from .cooccurrence import merge as merge
from .cooccurrence import pair_counts as pair_counts
from .readers import Damage as Damage
from .readers import Shard as Shard
from .readers import find_shards as find_shards
from .readers import read_labelled as read_labelled
from .readers import read_shard as read_shard
from .runs import Corpus as Corpus
from .runs import count_corpus as count_corpus
from .runs import count_on_dask as count_on_dask
from .runs import load_counts as load_counts
from .runs import save_counts as save_counts
from .terms import Terms as Terms
from .terms import surface_terms as surface_terms
from .terms import token_terms as token_terms
