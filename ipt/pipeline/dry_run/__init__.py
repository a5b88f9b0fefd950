"""Dry runs: what a training (training, inputs) and a recipe with arms (arms) need."""
