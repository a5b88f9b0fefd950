"""Scores of a language model on tasks. `run.evaluate` does a stage's work, `results.compare` and `results.table` read its folders."""
