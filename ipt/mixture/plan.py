"""The plan: which tokens of which documents fill which packed sequence. Blocks are computed on
demand.

A plan is a pure function of the document lengths, the mixture, the number of sequences and the
seed. It does not depend on ranks or workers, so order, exact token ratios and resuming follow from
one integer, the number of sequences already trained on. Memory does not grow with the run: the
tokens of a source before a block are a closed formula (ipt.mixture.quotas), and a source can be
read at any position (ipt.mixture.order), so a block does not depend on the blocks before it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ipt.config import MixtureConfig
from ipt.errors import UserError
from ipt.mixture.order import Documents, Recent, Stream
from ipt.mixture.packing import Packed, best_fit, concatenate, split_long
from ipt.mixture.quotas import Quotas, cap_shares
from ipt.mixture.schedule import Schedule, read_schedule

# sequences of a block at least, or all of a shorter run: enough to choose from, a few milliseconds
# of work
BLOCK = 256
SPARE = 128  # best_fit leaves the room of one sequence in so many free


class Piece(NamedTuple):
    """Tokens `start:end` of a document of `length` tokens. `source` is an index into
    `Plan.sources`.
    """

    source: int
    document: int
    start: int
    end: int
    length: int


class Plan:
    """`n_sequences` sequences of `seq_len` tokens, filled from the streams of sources.

    `asked` is the requested schedule in tokens, `quotas` the realised one; `notes` explain
    differences and other decisions. `tokens` is the number of trained tokens, without padding,
    which only best_fit has.
    """

    def __init__(
        self,
        streams: list[Stream],
        quotas: Quotas,
        asked: Schedule,
        config: MixtureConfig,
        n_sequences: int,
        seed: int,
    ) -> None:
        self.streams, self.quotas, self.asked, self.config = streams, quotas, asked, config
        self.sources = asked.sources
        self.seq_len = config.seq_len
        self.seed = seed
        self.notes = list[str]()
        self._sequences = n_sequences
        self._fits = config.packing == "best_fit"
        self.n_blocks = max(1, n_sequences // max(BLOCK, SPARE * len(streams) * self._fits))
        self._recent = Recent(8)
        self.tokens = int(self.read_until(self.n_blocks).sum())

    def __len__(self) -> int:
        return self._sequences

    def sequence(self, index: int) -> list[Piece]:
        """Pieces of a sequence in order. With best_fit they may fill less than `seq_len`; the rest
        is padding.
        """
        number = ((index + 1) * self.n_blocks - 1) // self._sequences
        block, place = self.block(number), index - self.block_start(number)
        return [
            Piece(*row)
            for row in block.pieces[block.bounds[place] : block.bounds[place + 1]].tolist()
        ]

    def block_start(self, number: int) -> int:
        """The first sequence of a block. Block sizes differ by at most one sequence."""
        return number * self._sequences // self.n_blocks

    def block(self, number: int) -> Packed:
        """The packed sequences of a block. The most recent blocks are cached."""
        return self._recent.get(number, lambda: self._pack(number))

    def read_until(self, number: int) -> np.ndarray:
        """Tokens that each source has contributed at the start of block `number` (or, for
        `n_blocks`, at the end of the run): int64 [sources].

        With concat this is the quota. With best_fit a document, or piece of a long one, belongs to
        the block that contains its start by the quota; a run that is too short for that also ends
        at the quota.
        """
        quota = self.quotas.at(np.array([_trained(self.block_start(number), self.config)]))[0]
        if not self._fits or self._sequences < SPARE * len(self.streams):
            return quota
        return quota + [
            _overhang(stream, position, self.seq_len)
            for stream, position in zip(self.streams, quota.tolist(), strict=True)
        ]

    def _pack(self, number: int) -> Packed:
        starts, stops = self.read_until(number), self.read_until(number + 1)
        pieces = [
            np.insert(stream.read(int(start), int(stop)), 0, source, axis=1)
            for source, (stream, start, stop) in enumerate(
                zip(self.streams, starts, stops, strict=True)
            )
        ]
        first, last = self.block_start(number), self.block_start(number + 1)
        if self._fits:
            whole = split_long(np.concatenate(pieces), self.seq_len)
            return best_fit(whole, self.seq_len, last - first, self.seed, "block", number)
        targets = self.quotas.exact(np.arange(first, last + 1) * float(self.seq_len)) - starts
        return concatenate(pieces, targets, self.seq_len)


def make_plan(
    stores: Mapping[str, Documents], config: MixtureConfig, n_sequences: int, seed: int
) -> Plan:
    """Plan a run. At the start of each block every source has contributed exactly its share of the
    trained tokens.

    `stores` must contain the sources that `ipt.mixture.schedule.used_sources` names; others are
    ignored. A source is read in random order and completely before any of it repeats. Raises
    UserError for an impossible mixture: a source without tokens, more repeats than allowed, and the
    errors of `schedule_points`.
    """
    schedule, tokens = read_schedule(config), _trained(n_sequences, config)
    shares = {
        name: _subsample(config, name, n_sequences * config.seq_len) for name in schedule.sources
    }
    streams = [Stream(stores[name], name, seed, shares[name]) for name in schedule.sources]
    for stream, name in zip(streams, schedule.sources, strict=True):
        if not stream.n_tokens:
            used = (
                f" in the {shares[name]:.2%} of its documents that are used"
                if shares[name] < 1 and stores[name].n_tokens
                else ""
            )
            raise UserError(
                f"source {name} has no tokens{used}, but the mixture gives it a share: make its "
                "ratio 0"
            )
    asked = _in_tokens(schedule, streams) if config.unit == "documents" else schedule
    kept, notes = _limit_repeats(config, asked, streams, tokens)
    plan = Plan(streams, Quotas(kept, tokens), asked, config, n_sequences, seed)
    plan.notes = [
        _subsample_note(config, name, share) for name, share in shares.items() if share < 1
    ] + notes
    return plan


def _subsample(config: MixtureConfig, source: str, run: int) -> float:
    if config.match_tokens is not None:
        return min(1.0, run / config.match_tokens)
    return config.subsample.get(source, 1.0)


def _subsample_note(config: MixtureConfig, source: str, share: float) -> str:
    matching = (
        f", so that it repeats as in a run of {config.match_tokens:,} tokens"
        if config.match_tokens
        else ""
    )
    return f"{source}: {share:.2%} of its documents are used{matching}"


def _in_tokens(schedule: Schedule, streams: list[Stream]) -> Schedule:
    """Document proportions converted to token proportions by the mean document length of each
    source.
    """
    return schedule.with_shares(
        schedule.shares * [stream.n_tokens / stream.n_documents for stream in streams]
    )


def _limit_repeats(
    config: MixtureConfig, asked: Schedule, streams: list[Stream], tokens: int
) -> tuple[Schedule, list[str]]:
    """The schedule limited by `mixture.max_repeats`, and notes about it."""
    repeats = {
        name: share * tokens / stream.n_tokens
        for name, share, stream in zip(asked.sources, asked.mean(), streams, strict=True)
    }
    limits = {
        name: config.max_repeats[name]
        for name in asked.sources
        if config.max_repeats.get(name) is not None
    }
    over = [name for name, limit in limits.items() if repeats[name] > limit]
    if over and config.on_max_repeats == "stop":
        name = over[0]
        raise UserError(
            f"mixture.max_repeats.{name}={limits[name]}: this run would read source {name} "
            f"{repeats[name]:.2f} times; "
            "lower its ratio, take fewer steps or allow more repeats"
        )
    if not over or config.on_max_repeats == "repeat":
        return asked, [
            f"{name}: read {repeats[name]:.2f} times, above "
            f"mixture.max_repeats.{name}={limits[name]:g}"
            for name in over
        ]
    caps = {
        name: limits[name] * stream.n_tokens
        for name, stream in zip(asked.sources, streams, strict=True)
        if name in limits
    }
    kept = cap_shares(asked, caps, tokens)
    return kept, [
        f"{name}: {before:.2%} were asked for, {after:.2%} it gets: "
        f"mixture.max_repeats.{name}={limits[name]:g}; the others share the rest"
        for name, before, after in zip(asked.sources, asked.mean(), kept.mean(), strict=True)
        if name in limits and (name in over or after < before)
    ]


def _overhang(stream: Stream, position: int, seq_len: int) -> int:
    """Tokens from a position of a stream to the end of the document (or piece of a long one) that
    contains it.
    """
    _, start, _, length = stream.read(position, position + 1)[0].tolist()
    return min(-(-start // seq_len) * seq_len, length) - start


def _trained(sequences: int, config: MixtureConfig) -> int:
    """Number of planned tokens in that many sequences. best_fit leaves space so that everything
    that begins in a block ends in it.
    """
    room = sequences * config.seq_len
    return room - -(-room // SPARE) if config.packing == "best_fit" else room
