"""Cross-lingual interpretability on JAX; see the README for the public functions."""

__version__ = "0.1.0"
