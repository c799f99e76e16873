"""A small run in a process of its own, to be killed: `training_run.py DIR STEPS`."""

import sys

import jax
import numpy as np

from jaxling import models, training

CONFIG = dict(
    model_type="llama",
    vocab_size=97,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
RECIPE = training.Recipe(
    steps=60, batch=8, length=32, warmup_steps=5, rates=(("embedding", 0.5),)
)


def documents():
    """Texts in which every token follows from the one before it."""
    rng = np.random.default_rng(7)
    for _ in range(150):
        start, length = rng.integers(0, 97), rng.integers(3, 40)
        yield ((start * 5 ** np.arange(length, dtype=object)) % 97).tolist()


def main(workdir):
    file = training.write_tokens(f"{workdir}.tokens", documents(), vocabulary_size=97)
    model = models.build(CONFIG, jax.random.key(0))
    training.train(
        model, file, RECIPE, workdir=workdir, snapshot_every=7, progress=False
    )


if __name__ == "__main__":
    main(sys.argv[1])
