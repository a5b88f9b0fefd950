"""Filters that drop documents: by length, language and duplication."""
