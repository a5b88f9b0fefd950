"""Rendering as a pure function: the texts depend only on the rows of one chain, the settings and a
seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ipt.config import RenderingConfig, check_choices
from ipt.errors import UserError
from ipt.rendering.draws import Draws
from ipt.rendering.layouts import LAYOUTS, PARAGRAPH, Style, choose_layout, optional, show
from ipt.rendering.pairs import AugmentedDocument, ChainRow, read_document
from ipt.rendering.pools import Pools, load_pools

SOURCE = "instruction"  # the name that these texts have in the mixture


@dataclass(frozen=True)
class Settings:
    """A validated `RenderingConfig` with its template pools."""

    arrangement: str
    layouts: Mapping[str, float]
    inversion: float
    pools: Pools
    versions: int
    mark: Callable[[str, str], str] | None = None  # for a preview: see Style

    @classmethod
    def of(cls, config: RenderingConfig) -> "Settings":
        """Raises UserError or MissingFileError, one line that names the key."""
        check_settings(config)
        layouts = {name: float(weight) for name, weight in config.layouts.items()}
        return cls(
            config.arrangement,
            layouts,
            float(config.inversion),
            load_pools(config.templates),
            config.versions,
        )


class Text(NamedTuple):
    """One text to train on."""

    id: str  # first document, version and part: unique as long as the documents' ids are
    text: str  # never empty
    source: str
    n_shots: int  # documents whose pairs are in it; 0: a bare document or a rewritten one
    n_pairs: int
    # raw: a bare document; rewrite: a text that was written from one; stitched: several layouts
    layout: str
    inverted: bool = False  # by chance, not by the arrangement


def render_chain(rows: Sequence[ChainRow], settings: Settings, seed: int) -> list[Text]:
    """Render the rows of one chain that form one M-shot text (paper sections 1.5 and 2).

    Documents without usable pairs become raw text, except with `pairs_only`. A rewritten document
    is a text of its own, and its source is then not output as raw text for lack of pairs. The
    result has `settings.versions` renderings of everything; `stitched` joins them to one text per
    document. It is empty if there is nothing to print.
    """
    return render_documents([read_document(row) for row in rows], settings, seed)


def render_documents(
    documents: Sequence[AugmentedDocument], settings: Settings, seed: int
) -> list[Text]:
    """Like `render_chain`, for rows whose pairs are already parsed."""
    if ARRANGEMENTS[settings.arrangement].stitched:
        return [text for document in documents for text in _stitch(document, settings, seed)]
    texts: list[Text] = []
    for version in range(settings.versions):
        style = Style(settings.pools, Draws(seed, documents[0].doc_id, version), settings.mark)
        texts += _render_version(documents, settings, version, style)
    return texts


def check_settings(config: RenderingConfig) -> None:
    """Raises UserError unless arrangement, layouts, inversion and versions are valid."""
    check_choices(config, "rendering.")
    for name, weight in config.layouts.items():
        if name not in LAYOUTS:
            raise UserError(
                f"rendering.layouts.{name}: no such layout, expected some of {', '.join(LAYOUTS)}"
            )
        if not 0 <= weight < float("inf"):
            raise UserError(
                f"rendering.layouts.{name}={weight}: a weight must be a number that is not negative"
            )
    if not sum(config.layouts.values()):
        raise UserError(
            "rendering.layouts: all weights are zero, give one layout more; rendering=paper has "
            "the published weights"
        )
    if not 0 <= config.inversion <= 1:
        raise UserError(
            f"rendering.inversion={config.inversion}: a probability must be between 0 and 1"
        )
    if config.versions < 1:
        raise UserError(f"rendering.versions={config.versions}: expected at least 1")


# Arrangements
# ----------------------------------------------------------------------------------------------


class Shot(NamedTuple):
    """A document and its laid-out pairs, as parts of one text."""

    document: str  # may be empty
    block: str
    takes_lead: bool  # whether the layout leaves it to us to lead from one to the other


class Arrangement(NamedTuple):
    """How documents and pairs are combined, and which documents also become raw texts."""

    place: Callable[[Shot, Style], str]
    suffix: str  # of the id of the text that holds the pairs
    raw_with_pairs: bool  # documents with usable pairs are raw texts
    raw_without_pairs: bool  # documents without usable pairs are raw texts
    stitched: bool = False  # the versions of a document are one text, which the document ends


def document_first(shot: Shot, style: Style) -> str:
    """The document with an optional introduction, an optional bridge, then the pairs (paper section
    2.5).
    """
    if not shot.document:
        return shot.block
    start = optional("document_start", style.pools.starts, style)
    bridge = optional("bridge", style.pools.bridges, style) if shot.takes_lead else None
    document = start.fill(context=shot.document) if start else shot.document
    return PARAGRAPH.join((document, _led_by(bridge, shot.block, style)))


def pairs_first(shot: Shot, style: Style) -> str:
    """An optional opening, the pairs, then the document."""
    if not shot.document:
        return shot.block
    opening = (
        optional("inverted_opening", style.pools.inverted_openings, style)
        if shot.takes_lead
        else None
    )
    document = style.draws.pick("inverted_start", style.pools.inverted_starts).fill(
        context=shot.document
    )
    return PARAGRAPH.join((_led_by(opening, shot.block, style), document))


def pairs_alone(shot: Shot, style: Style) -> str:
    return shot.block


def _led_by(lead: str | None, block: str, style: Style) -> str:
    return lead + style.draws.pick("gap", style.pools.gaps) + block if lead else block


ARRANGEMENTS: dict[str, Arrangement] = {
    "attached": Arrangement(document_first, "", raw_with_pairs=False, raw_without_pairs=True),
    "pairs_first": Arrangement(pairs_first, "", raw_with_pairs=False, raw_without_pairs=True),
    "detached": Arrangement(pairs_alone, "/pairs", raw_with_pairs=True, raw_without_pairs=True),
    "pairs_only": Arrangement(pairs_alone, "/pairs", raw_with_pairs=False, raw_without_pairs=False),
    "stitched": Arrangement(
        pairs_first, "", raw_with_pairs=False, raw_without_pairs=True, stitched=True
    ),
}


def _render_version(
    documents: Sequence[AugmentedDocument], settings: Settings, version: int, style: Style
) -> list[Text]:
    arrangement = ARRANGEMENTS[settings.arrangement]
    with_pairs = [document for document in documents if document.items]
    texts = [_render_pairs(with_pairs, arrangement, settings, version, style)] if with_pairs else []
    for document in documents:
        if (
            arrangement.raw_with_pairs
            if document.items
            else arrangement.raw_without_pairs and not document.rewrite
        ):
            texts += _raw(document, version, style)
        if document.rewrite:
            rewrite = style.shown("rewrite", document.rewrite)
            texts.append(
                Text(
                    f"{document.doc_id}/{version}/rewrite",
                    rewrite,
                    SOURCE,
                    n_shots=0,
                    n_pairs=0,
                    layout="rewrite",
                )
            )
    return texts


def _render_pairs(
    documents: Sequence[AugmentedDocument],
    arrangement: Arrangement,
    settings: Settings,
    version: int,
    style: Style,
) -> Text:
    """The text with the pairs of `documents`, each of which has some."""
    counts = [len(document.items) for document in documents]
    name = choose_layout(settings.layouts, min(counts), style.draws.fraction("layout"))
    layout = LAYOUTS[name]
    inverted = (
        arrangement.place is document_first
        and style.draws.fraction("inversion") < settings.inversion
    )
    place = pairs_first if inverted else arrangement.place
    shots = []
    for index, document in enumerate(documents):
        block = layout.render(show(document.items, index, style), style)
        shots.append(
            place(
                Shot(style.shown("document", document.text.strip()), block, layout.takes_lead),
                style,
            )
        )
    text = style.draws.pick("separator", settings.pools.separators).join(shots)
    return Text(
        f"{documents[0].doc_id}/{version}{arrangement.suffix}",
        text,
        SOURCE,
        len(documents),
        sum(counts),
        name,
        inverted,
    )


def _stitch(document: AugmentedDocument, settings: Settings, seed: int) -> list[Text]:
    """One text: the document's pairs in each version, its rewrite, and the document itself at the
    end.
    """
    styles = [
        Style(settings.pools, Draws(seed, document.doc_id, version), settings.mark)
        for version in range(settings.versions)
    ]
    first = styles[0]
    if not document.items and not document.rewrite:
        return _raw(document, 0, first)
    layouts, blocks = [], []
    for style in styles if document.items else []:
        layouts.append(
            LAYOUTS[
                choose_layout(settings.layouts, len(document.items), style.draws.fraction("layout"))
            ]
        )
        blocks.append(layouts[-1].render(show(document.items, 0, style), style))
    if document.rewrite:
        blocks.append(first.shown("rewrite", document.rewrite))
    joined = first.draws.pick("separator", settings.pools.separators).join(blocks)
    shot = Shot(
        first.shown("document", document.text.strip()),
        joined,
        bool(layouts) and layouts[0].takes_lead,
    )
    text = pairs_first(shot, first)
    return [
        Text(
            f"{document.doc_id}/0",
            text,
            SOURCE,
            int(bool(document.items)),
            len(document.items) * len(styles),
            "stitched",
        )
    ]


def _raw(document: AugmentedDocument, version: int, style: Style) -> list[Text]:
    if not document.text.strip():
        return []
    return [
        Text(
            f"{document.doc_id}/{version}",
            style.shown("document", document.text),
            SOURCE,
            n_shots=0,
            n_pairs=0,
            layout="raw",
        )
    ]
