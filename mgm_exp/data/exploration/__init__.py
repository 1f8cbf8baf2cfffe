"""Exploration of a dataset: its captions and images in numbers that can be compared (docs/exploration.md)."""

from mgm_exp.data.exploration.text import text_statistics

__all__ = ["text_statistics"]
