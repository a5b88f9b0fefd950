"""The embedded corpus: pages and closed-book questions from biomedical ontologies."""
