"""How fast is a forward pass beside transformers on the same threads?

    python -m experiments.benchmarks.models

A 6-layer 384-wide encoder and a 6-layer 512-wide decoder with random weights, float32,
batch 16 x 128, turn by turn in one process; medians of `--repeats` turns. transformers
runs its default attention (sdpa) without gradients. Needs the `torch` extra. Records go
to `experiments/benchmarks/results.jsonl`.
"""

import tempfile
from importlib import metadata
from typing import Any

import jax
import numpy as np
from absl import app, flags

from jaxling import models

from . import harness

REPEATS = flags.DEFINE_integer("repeats", 7, "Turns of which the median is taken.")
BATCH, LENGTH = 16, 128
CASES: dict[str, dict[str, Any]] = {
    "encoder": dict(
        model_type="bert",
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
    ),
    "decoder": dict(
        model_type="llama",
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
}


def measure(name: str, config: dict[str, Any]) -> None:
    """Times both and records how many times as fast ours is."""
    import torch
    import transformers

    auto: Any = transformers.AutoModelForMaskedLM
    if config["model_type"] == "llama":
        auto = transformers.AutoModelForCausalLM
    theirs = auto.from_config(transformers.AutoConfig.for_model(**config)).eval()
    with tempfile.TemporaryDirectory() as path:
        theirs.save_pretrained(path)
        ours = models.load(path)
    tokens = np.random.default_rng(0).integers(0, 8192, (BATCH, LENGTH))
    mask = np.ones_like(tokens)
    torch_tokens, torch_mask = torch.tensor(tokens), torch.tensor(mask)

    def run_theirs() -> np.ndarray:
        with torch.inference_mode():
            return theirs(torch_tokens, attention_mask=torch_mask).logits.numpy()

    def run_ours() -> np.ndarray:
        return np.asarray(jax.block_until_ready(ours(tokens, mask)))

    timings, results = harness.interleaved(
        {"jaxling": run_ours, "transformers": run_theirs}, REPEATS.value
    )
    own, first = timings["jaxling"].median, timings["jaxling"].first
    difference = np.abs(results["jaxling"] - results["transformers"]).max()
    found = {
        "times_as_fast": round(timings["transformers"].median / own, 2),
        "compile_s": round((first or 0.0) - own, 2),
        "largest_difference": float(difference),
        "threads": torch.get_num_threads(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }
    case = {"model": name, "batch": BATCH, "length": LENGTH, "dtype": "float32"}
    harness.record("models", case, timings, found)


def main(argv: list[str]) -> None:
    """Measures every case."""
    del argv
    for name, config in CASES.items():
        measure(name, config)


if __name__ == "__main__":
    app.run(main)
