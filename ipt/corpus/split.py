"""Splits documents into training and held-out ones by a seeded hash."""

from typing import Any

from ipt.config import CorpusConfig
from ipt.corpus.documents import Document
from ipt.corpus.hashing import unit_hash
from ipt.errors import UserError


class Split:
    """Holds out single documents or, with `held_out_by`, all documents with the same value of that
    field.
    """

    def __init__(self, config: CorpusConfig, seed: int) -> None:
        self._field = config.held_out_by
        self._fraction = config.held_out_fraction
        self._seed = seed
        self._training: set[str] = set()
        self._held_out: set[str] = set()
        self._documents_without = 0

    def hold_out(self, document: Document) -> bool:
        """Whether the document is held out. A document without the field is a training document."""
        if self._field is None:
            return unit_hash(self._seed, "held out document", document.doc_id) < self._fraction
        if self._field not in document.meta:
            self._documents_without += 1
            return False
        group = document.meta[self._field]
        held_out = unit_hash(self._seed, "held out group", group) < self._fraction
        (self._held_out if held_out else self._training).add(group)
        return held_out

    def check(self) -> None:
        """Raises UserError if no document had the field."""
        if self._field and self._fraction and not self._held_out | self._training:
            raise UserError(
                f"corpus.held_out_by={self._field}: no document has this field, so none can be "
                "held out: choose another field"
            )

    def report(self) -> dict[str, Any]:
        """The entry of stats.json; empty without `held_out_by`."""
        if self._field is None:
            return {}
        groups = {
            "by": self._field,
            "training": len(self._training),
            "held_out": sorted(self._held_out),
            "documents_without": self._documents_without,
        }
        return {"held_out_groups": groups}
