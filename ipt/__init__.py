"""Instruction Pre-Training (arXiv 2406.14491): documents, pairs, texts, tokens, batches, weights,
scores, report.
"""

__version__ = "0.1.0"
