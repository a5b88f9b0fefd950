"""The plan: which tokens of which documents fill which packed sequence, derived block by block when
it is asked for.

A plan is a pure function of the documents' lengths, the mixture, the number of sequences and the
seed. It knows nothing of ranks or workers, so order, exact token ratios and resuming are arithmetic
on one integer, the number of sequences already trained on. Nothing in it grows with the run: what a
source has given at a block's beginning is a closed formula (ipt.mixture.quotas), a source can be
read from any position on (ipt.mixture.order), and so a block follows without those before it.
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
    """Tokens `start:end` of a document of `length` tokens; sources are numbered in the order of
    `Plan.sources`.
    """

    source: int
    document: int
    start: int
    end: int
    length: int


class Plan:
    """`n_sequences` sequences of `seq_len` tokens, filled from the streams of sources.

    `asked` is the schedule of the request in tokens, `quotas` what each source gives in the end;
    `notes` say in words where the two differ and what else was decided. `tokens` are those that are
    trained on: without padding, which only best_fit has.
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
        self.sources, self.seq_len, self.seed, self.notes = (
            asked.sources,
            config.seq_len,
            seed,
            list[str](),
        )
        self._sequences = n_sequences
        self._fits = config.packing == "best_fit"
        self.n_blocks = max(1, n_sequences // max(BLOCK, SPARE * len(streams) * self._fits))
        self._recent = Recent(8)
        self.tokens = int(self.read_until(self.n_blocks).sum())

    def __len__(self) -> int:
        return self._sequences

    def sequence(self, index: int) -> list[Piece]:
        """Pieces of a sequence in their order; with best_fit they may fill less than `seq_len`, and
        the rest is padding.
        """
        number = ((index + 1) * self.n_blocks - 1) // self._sequences
        block, place = self.block(number), index - self.block_start(number)
        return [
            Piece(*row)
            for row in block.pieces[block.bounds[place] : block.bounds[place + 1]].tolist()
        ]

    def block_start(self, number: int) -> int:
        """The first sequence of a block; blocks differ in size by one sequence at most."""
        return number * self._sequences // self.n_blocks

    def block(self, number: int) -> Packed:
        """The packed sequences of a block; a few of those asked for last are kept."""
        return self._recent.get(number, lambda: self._pack(number))

    def read_until(self, number: int) -> np.ndarray:
        """Tokens that each source has given when block `number` begins (or, at `n_blocks`, when the
        run ends): int64 [sources].

        With concat that is its quota. With best_fit a document, or piece of a long one, belongs to
        the block in which its beginning lies by the quota; a run too short to have room for that
        ends at the quota too.
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
    """Plan a run: each source gets its share of all trained tokens at every moment, to the token at
    each block's beginning.

    `stores` needs the sources that `ipt.mixture.schedule.used_sources` names; others are not looked
    at. A source is read in a random order, all of it before any of it is repeated. Raises UserError
    for a mixture that cannot be: a source without tokens, more repeats than allowed, and what
    `schedule_points` raises.
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
    """Shares of documents as shares of tokens, by the mean length of each source's documents."""
    return schedule.with_shares(
        schedule.shares * [stream.n_tokens / stream.n_documents for stream in streams]
    )


def _limit_repeats(
    config: MixtureConfig, asked: Schedule, streams: list[Stream], tokens: int
) -> tuple[Schedule, list[str]]:
    """The schedule within `mixture.max_repeats`, and what has to be said about it."""
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
    has begun before it.
    """
    _, start, _, length = stream.read(position, position + 1)[0].tolist()
    return min(-(-start // seq_len) * seq_len, length) - start


def _trained(sequences: int, config: MixtureConfig) -> int:
    """Tokens that fill so many sequences by the plan; best_fit leaves room, so that all that begins
    in a block can end in it.
    """
    room = sequences * config.seq_len
    return room - -(-room // SPARE) if config.packing == "best_fit" else room
