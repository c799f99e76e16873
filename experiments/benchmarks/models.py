"""How fast is a forward pass beside transformers on the same threads?

    python -m experiments.benchmarks.models

A 6-layer 384-wide encoder and a 6-layer 512-wide decoder with random weights, float32,
batch 16 x 128, turn by turn in one process; medians of `--repeats` turns. transformers
runs its default attention (sdpa) without gradients. Needs the `torch` extra. The record
is written to `experiments/benchmarks/models.json`.
"""

import json
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata

import jax
import numpy as np
from absl import app, flags

from jaxling import models

REPEATS = flags.DEFINE_integer("repeats", 7, "Turns of which the median is taken.")
RECORD = pathlib.Path(__file__).with_name("models.json")
BATCH, LENGTH = 16, 128
CASES = {
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


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(config: dict) -> dict[str, float]:
    """Medians of both, their ratio, and what the first call took."""
    import torch
    import transformers

    auto = transformers.AutoModelForMaskedLM
    if config["model_type"] == "llama":
        auto = transformers.AutoModelForCausalLM
    theirs = auto.from_config(transformers.AutoConfig.for_model(**config)).eval()
    with tempfile.TemporaryDirectory() as path:
        theirs.save_pretrained(path)
        ours = models.load(path)
    tokens = np.random.default_rng(0).integers(0, 8192, (BATCH, LENGTH))
    mask = np.ones_like(tokens)
    torch_tokens, torch_mask = torch.tensor(tokens), torch.tensor(mask)

    def run_theirs() -> torch.Tensor:
        with torch.inference_mode():
            return theirs(torch_tokens, attention_mask=torch_mask).logits

    def run_ours() -> jax.Array:
        return jax.block_until_ready(ours(tokens, mask))

    first = seconds(run_ours)
    difference = float(np.abs(run_theirs().numpy() - np.asarray(run_ours())).max())
    times = [(seconds(run_theirs), seconds(run_ours)) for _ in range(REPEATS.value)]
    theirs_median, ours_median = map(statistics.median, zip(*times))
    return {
        "transformers_s": round(theirs_median, 4),
        "jaxling_s": round(ours_median, 4),
        "times_as_fast": round(theirs_median / ours_median, 2),
        "compile_s": round(first - ours_median, 2),
        "largest_difference": difference,
    }


def main(argv: list[str]) -> None:
    del argv
    import torch

    record = {
        "cases": {name: measure(config) for name, config in CASES.items()},
        "shape": [BATCH, LENGTH],
        "threads": torch.get_num_threads(),
        "devices": [str(device) for device in jax.devices()],
        "processor": platform.processor() or platform.machine(),
        "versions": {
            name: metadata.version(name)
            for name in ("jax", "flax", "transformers", "torch")
        },
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    app.run(main)
