"""Measured speed: one harness, one file per table of cases."""
