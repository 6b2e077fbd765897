"""Texts packed into rows of one length, with masks that keep them apart.

A row holds texts one after the other and, in the on-policy phase, drafts that go on from inside a text: a draft sees
the text up to its cut and itself, so that one pass computes a text and all its drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.distill.target import Distributions, joined
from shared.distill.texts import Text

_OPEN_ROWS = 32


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens the student wrote after the first `cut` tokens of a text; `expected` follows each of them."""

    cut: int
    tokens: Sequence[int]
    expected: Distributions


@dataclass(frozen=True, slots=True)
class Piece:
    """A text and the drafts that go on from it."""

    text: Text
    drafts: tuple[Draft, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.text.tokens) + sum(len(draft.tokens) for draft in self.drafts)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on the student's device; `chosen` index the flattened rows whose next token `expected` describes.

    `is_draft` tells the chosen rows that come from drafts.
    """

    token_ids: Tensor  # int64 [num_rows, row_tokens]
    positions: Tensor  # int64 [num_rows, row_tokens]
    mask: Tensor  # bool [num_rows, row_tokens, row_tokens]
    chosen: Tensor  # int64 [n]
    is_draft: Tensor  # bool [n]
    expected: Distributions


class _Row:
    """One row while it is filled; `segment` and `branch` say who sees whom."""

    def __init__(self, length: int) -> None:
        self.token_ids = np.zeros(length, dtype=np.int64)
        self.positions = np.zeros(length, dtype=np.int64)
        self.segment = np.full(length, -1)
        self.branch = np.zeros(length, dtype=np.int64)
        self.limit = np.zeros(length, dtype=np.int64)
        self.used = 0

    def add(self, tokens: Sequence[int] | npt.NDArray[np.int32], start: int, segment: int, branch: int) -> int:
        """Place tokens whose first position is `start`; returns where they begin in the row."""
        at = slice(self.used, self.used + len(tokens))
        self.token_ids[at] = tokens
        self.positions[at] = np.arange(start, start + len(tokens))
        self.segment[at] = segment
        self.branch[at] = branch
        self.limit[at] = start
        self.used = at.stop
        return at.start

    def mask(self) -> npt.NDArray[np.bool_]:
        """[token, key]: same text, not later, and on the token's own branch or before its cut."""
        same = self.segment[:, None] == self.segment[None]
        earlier = self.positions[None] <= self.positions[:, None]
        own = self.branch[:, None] == self.branch[None]
        trunk = (self.branch[None] == 0) & (self.positions[None] < self.limit[:, None])
        visible: npt.NDArray[np.bool_] = same & earlier & (own | trunk)
        return visible


def make_batch(packed: Sequence[Sequence[Piece]], row_tokens: int, device: torch.device) -> Batch:
    """Lay out one row for each list of pieces."""
    rows, chosen, flags, expected = [], [], [], []
    for index, pieces in enumerate(packed):
        row, base = _Row(row_tokens), index * row_tokens
        for segment, piece in enumerate(pieces):
            text = piece.text
            at = base + row.add(text.tokens, 0, segment, 0)
            chosen.append(at + np.arange(text.prompt_len - 1, len(text.tokens) - 1))
            flags.append(np.zeros(text.num_generated, dtype=bool))
            expected.append(text.expected)
            for branch, draft in enumerate(piece.drafts, 1):
                at = base + row.add(draft.tokens, draft.cut, segment, branch)
                chosen.append(at + np.arange(len(draft.tokens)))
                flags.append(np.ones(len(draft.tokens), dtype=bool))
                expected.append(draft.expected)
        rows.append(row)
    arrays = (
        np.stack([row.token_ids for row in rows]),
        np.stack([row.positions for row in rows]),
        np.stack([row.mask() for row in rows]),
        np.concatenate(chosen),
        np.concatenate(flags),
    )
    token_ids, positions, mask, at_rows, is_draft = (torch.from_numpy(array).to(device) for array in arrays)
    return Batch(token_ids, positions, mask, at_rows, is_draft, joined(expected))


def pack(pieces: Sequence[Piece], row_tokens: int) -> list[list[Piece]]:
    """First fit among the newest rows, in the order given; every piece fits an empty row."""
    packed: list[list[Piece]] = []
    room: list[int] = []
    for piece in pieces:
        size = piece.num_tokens
        newest = range(max(0, len(room) - _OPEN_ROWS), len(room))
        place = next((index for index in newest if room[index] >= size), None)
        if place is None:
            packed.append([])
            room.append(row_tokens)
            place = len(room) - 1
        packed[place].append(piece)
        room[place] -= size
    return packed


def batches_of_epoch(
    texts: Sequence[Text], row_tokens: int, batch_rows: int, seed: int, epoch: int
) -> list[list[list[Piece]]]:
    """The epoch's batches; a pure function of its arguments, so a resumed run finds its place again."""
    order = np.random.default_rng([seed, epoch]).permutation(len(texts))
    rows = pack([Piece(texts[index]) for index in order], row_tokens)
    return [rows[first : first + batch_rows] for first in range(0, len(rows), batch_rows)]
