"""A training step of a 10M-parameter Llama against a plain PyTorch loop, interleaved.

python -m experiments.benchmarks.training --training_rounds=9

The same model (9.9M parameters, vocabulary 13,566, tied), batch (16 x 128 tokens),
AdamW and clipping; the PyTorch loop is that of `transformers`' Llama with its defaults.
Rounds run ours and theirs one after another, in float32 and in bfloat16 (theirs by
autocast), on as many threads. Records go to `experiments/benchmarks/results.jsonl`;
processor seconds stand beside wall-clock seconds, for they change less when something
else runs on the machine.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers
from absl import app, flags

from jaxling import models
from jaxling.training import packing, recipe, steps

from . import harness

_ROUNDS = flags.DEFINE_integer("training_rounds", 7, "Interleaved repetitions.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the products.")
BATCH, LENGTH, VOCABULARY = 16, 128, 13_566
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def ours(tokens, dtype):
    """A function that makes one step and returns its loss."""
    model = models.build({"model_type": "llama", **CONFIG}, jax.random.key(0))
    settings = recipe.Recipe(batch=BATCH, length=LENGTH, dtype=dtype)
    frame, parameters = steps.take_apart(model)
    held = [steps.initial_state(settings, parameters)]
    predicted = np.ones(tokens.shape, bool)
    predicted[:, 0] = False
    rows = packing.Batch(tokens, np.ones_like(tokens), predicted)
    batch = steps.place_batch(rows, 1, None)

    def step():
        held[0], metrics = steps.train_step(
            frame, settings, None, held[0], batch, np.float32(1e-3)
        )
        return float(metrics.loss)

    return step


def theirs(tokens, dtype):
    """The same in PyTorch."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    inputs = torch.tensor(tokens).long()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main(argv: list[str]) -> None:
    """Times the loops and records how many times as fast ours is, for each dtype."""
    del argv
    torch.set_num_threads(os.cpu_count() or 1)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
    for dtype in _DTYPES.value:
        loops = {"jaxling": ours(tokens, dtype), "torch": theirs(tokens, dtype)}
        losses = {name: [step(), step()] for name, step in loops.items()}
        processor: dict[str, list[float]] = {name: [] for name in loops}

        def timed(name: str, step: Callable[[], float], used=processor) -> float:
            began = time.process_time()
            loss = step()
            used[name].append(time.process_time() - began)
            return loss

        timings, _ = harness.interleaved(
            {name: functools.partial(timed, name, loops[name]) for name in loops},
            _ROUNDS.value,
        )
        speed = {name: BATCH * LENGTH / timings[name].median for name in loops}
        found = {
            "times_as_fast": round(speed["jaxling"] / speed["torch"], 2),
            "tokens_per_second": {name: round(speed[name]) for name in loops},
            "processor_seconds": {
                name: round(statistics.median(processor[name]), 3) for name in loops
            },
            "losses": {name: np.round(losses[name], 3).tolist() for name in loops},
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        case = {"parameters": 9.9e6, "batch": BATCH, "length": LENGTH, "dtype": dtype}
        harness.record("training", case, timings, found)


if __name__ == "__main__":
    app.run(main)
