"""Scores of a language model on tasks. `run.evaluate` does a stage's work, `results` and `tables`
read its folders.
"""
