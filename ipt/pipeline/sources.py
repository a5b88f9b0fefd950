"""Sources of the mixture that are read as a corpus: texts as they are, and instructions with their
responses.
"""

from ipt.config import CorpusConfig, SourceConfig
from ipt.corpus.documents import RowText
from ipt.errors import UserError
from ipt.rendering.instructions import instruction_text

SOURCE_TEXTS: dict[str, RowText | None] = {
    "texts": None,
    "instructions": instruction_text,
}  # kind -> what makes a row's text


def source_corpus(source: str, config: SourceConfig) -> CorpusConfig:
    """A source of texts read as a corpus of which nothing is held out. Raises UserError if it names
    no place, or two.
    """
    if bool(config.path) == bool(config.dataset):
        raise UserError(
            f"mixture.sources.{source}: set either path (files) or dataset (a hub's data set)"
        )
    return CorpusConfig(
        kind="files" if config.path else "hub",
        path=config.path or None,
        dataset=config.dataset,
        subset=config.subset,
        split=config.split,
        text_field=config.text_field,
        template=config.template,
        held_out_fraction=0.0,
    )
