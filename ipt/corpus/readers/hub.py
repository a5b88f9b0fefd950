"""Reads the rows of a dataset on the Hugging Face hub."""

from collections.abc import Iterator

from ipt.config import CorpusConfig
from ipt.corpus.readers.files import first_line
from ipt.corpus.readers.rows import CorpusRow
from ipt.errors import UserError


def hub_rows(config: CorpusConfig, section: str) -> Iterator[CorpusRow]:
    if not config.dataset:
        raise UserError(
            f"{section}.dataset is not set: name a data set, such as {section}.dataset=owner/name"
        )
    from datasets import load_dataset  # takes seconds to import

    name = "/".join(part for part in (config.dataset, config.subset) if part)
    number = 0
    try:
        rows = load_dataset(config.dataset, config.subset, split=config.split, streaming=True)
        for number, values in enumerate(rows, start=1):
            yield CorpusRow(
                f"{name}, split {config.split}, row {number}",
                f"{name}:{config.split}",
                number,
                values,
            )
    except Exception as error:  # network, server, format: a hub raises whatever its clients do
        raise UserError(
            f"{section}.dataset={name}: split {config.split} cannot be read beyond row {number} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
