"""Experiment tracking: data lineage, results of evaluations, a W&B dashboard."""
