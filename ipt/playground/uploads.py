"""Texts from uploaded files."""

from itertools import islice
from pathlib import Path

from ipt.config import CorpusConfig
from ipt.corpus.documents import read_documents
from ipt.corpus.readers.files import CorpusFile
from ipt.errors import UserError

SUFFIXES = (".txt", ".md", ".jsonl")
MOST_DOCUMENTS = 1_000  # of a file


def read_texts(path: Path, text_field: str, max_characters: int) -> list[str]:
    """The text of a .txt or .md file, or the first 1,000 documents of a .jsonl file.

    Raises UserError, which names the file without its folder, for any other file and for one that
    cannot be read.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path.name}: expected one of {', '.join(SUFFIXES)}: convert the file first"
        )
    try:
        if path.suffix.lower() == ".jsonl":
            config = CorpusConfig(kind="files", path=path.name, text_field=text_field)
            file = CorpusFile(str(path), path.name, shown=path.name)  # hides its folder
            documents = islice(read_documents(config, files=[file]), MOST_DOCUMENTS)
            texts = [document.text for document in documents]
        else:
            texts = [path.read_bytes().decode("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path.name}: not UTF-8 (byte {error.start}): convert the file to UTF-8"
        ) from None
    for text in texts:
        check_text(text, max_characters, path.name)
    return texts


def check_text(text: str, max_characters: int, where: str = "the text") -> None:
    """Raise UserError for a text that is empty, too long or not valid Unicode."""
    if not text.strip():
        raise UserError(f"{where} is empty: paste a text or upload a file")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has an unpaired surrogate at character {error.start}: remove it"
        ) from None
    if len(text) > max_characters:
        raise UserError(
            f"{where} has {len(text):,} characters, more than "
            f"playground.max_characters={max_characters:,}: shorten it, or "
            "restart the playground with a higher limit"
        )
