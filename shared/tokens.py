"""Text taken apart on whole tensors of bytes: tokens as offsets, integers computed for all tokens at once.

Legend: T tokens, L lines, N tokens that are asked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_DIGITS = 18  # every integer of so many digits fits into 64 bits


@dataclass(frozen=True)
class Table:
    """A text as offsets of its tokens; row r is line r + 1 of the text."""

    data: bytes
    byte: Tensor  # uint8, the data
    start: Tensor  # [T] int64
    end: Tensor  # [T] int64
    ptr: Tensor  # [L + 1] int64, tokens of row r are ptr[r]:ptr[r + 1]

    def text(self, token: int) -> str:
        return self.data[int(self.start[token]) : int(self.end[token])].decode()

    def texts(self, tokens: Tensor) -> list[str]:
        spans = zip(self.start[tokens].tolist(), self.end[tokens].tolist(), strict=True)
        return [self.data[start:end].decode() for start, end in spans]

    def row_text(self, row: int) -> str:
        first, last = int(self.ptr[row]), int(self.ptr[row + 1])
        return "" if first == last else self.data[int(self.start[first]) : int(self.end[last - 1])].decode()


def tokenise(data: bytes, *, tabs: bool) -> Table:
    """Tokens between runs of ASCII blanks, or (tabs) between single tabs, where they may be empty and hold spaces.

    Lines end in a line feed; the last one needs none.
    """
    data += b"\n"
    byte = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    is_newline = byte == 10
    if tabs:
        end = torch.nonzero((byte == 9) | is_newline).squeeze(1)
        start = torch.cat([end.new_zeros(1), end[:-1] + 1])
    else:
        is_blank = (byte == 32) | ((byte >= 9) & (byte <= 13))
        after_blank = torch.cat([is_blank.new_ones(1), is_blank[:-1]])
        start = torch.nonzero(after_blank & ~is_blank).squeeze(1)
        end = torch.nonzero(is_blank & ~after_blank).squeeze(1)
    line_start = torch.cat([start.new_zeros(1), torch.nonzero(is_newline).squeeze(1) + 1])
    return Table(data, byte, start, end, torch.searchsorted(start, line_start))


def integers(table: Table, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens' values ([N] int64) where they are integers as Python prints them, and whether they are ([N] bool)."""
    start, width = table.start[tokens], table.end[tokens] - table.start[tokens]
    first = table.byte[start]
    is_negative = first == ord("-")
    start, width = start + is_negative, width - is_negative.long()
    first = table.byte[start]
    is_plain = (width >= 1) & (width <= _MAX_DIGITS) & ((first != ord("0")) | ((width == 1) & ~is_negative))
    value = torch.zeros_like(start)
    longest = int(width.clamp(max=_MAX_DIGITS).max()) if width.numel() else 0
    for k in range(longest):
        inside = width > k
        digit = table.byte[(start + k).clamp(max=table.byte.numel() - 1)].long() - ord("0")
        is_plain &= ~inside | ((digit >= 0) & (digit <= 9))
        value = torch.where(inside, value * 10 + digit, value)
    return torch.where(is_negative, -value, value), is_plain
