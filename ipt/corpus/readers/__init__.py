"""Readers of a corpus: find the files, open them, and read rows of each format."""
