"""Captions as numbers: CLIP's byte-pair tokenizer from its vocabulary file, and one token per byte for the demo.

Both have the same two attributes and two functions. A row is start, text, end, zeros; the end has the highest number of
all, and every number fits into 16 unsigned bits.
"""

import gzip
import html
import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import torch
from torch import Tensor

CONTEXT = 77  # tokens of a row, as CLIP was trained
BYTE_CONTEXT = 160  # a caption has about two hundred bytes at most, and few more than this

_MERGES = 48_894  # the file holds more; CLIP's vocabulary ends here
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"

# As CLIP's expression, which needs a package beside Python's own: contractions, runs of letters, single digits, runs of
# the rest. Python's \w and \d count numbers such as one half among the letters: `_words` takes those out again.
_PIECE = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE
)


class TokenizerError(ValueError):
    """The vocabulary file cannot be used."""


class ByteTokenizer:
    """Every byte of the cleaned text is a token; needs no file, and belongs to models trained with it alone."""

    vocab_size = 258

    def __init__(self, context: int = BYTE_CONTEXT) -> None:
        self.context = context

    def encode(self, text: str) -> list[int]:
        """The text's tokens without start, end and padding."""
        return list(clean(text).encode())

    def encode_batch(self, texts: Iterable[str]) -> Tensor:
        """[N, L] int64 rows of `context` tokens; a text that is too long loses its end, but never the end token."""
        return _rows(map(self.encode, texts), context=self.context, start=256, end=257)


class BytePairTokenizer:
    """CLIP's tokenizer: words are bytes, joined in pairs by the rules of its vocabulary file, earlier rules first.

    Equal to CLIP's own but for the repairs that the package ftfy makes there (curly quotes, full-width letters); of
    those only the composed form of accents is done here.
    """

    def __init__(self, merges: Sequence[tuple[str, str]], context: int = CONTEXT) -> None:
        """merges: pairs of symbols as in the file, where a byte is a printable character and </w> ends a word."""
        self.context = context
        symbols = list(_byte_symbols().values())
        vocabulary = [
            *symbols,
            *(symbol + _WORD_END for symbol in symbols),
            *(first + second for first, second in merges),
            _START,
            _END,
        ]
        self.vocab_size = len(vocabulary)
        self._number = {symbol: number for number, symbol in enumerate(vocabulary)}
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._symbol = _byte_symbols()
        self._known = {_START: [self._number[_START]], _END: [self._number[_END]]}  # tokens of words met before

    def encode(self, text: str) -> list[int]:
        """The text's tokens without start, end and padding."""
        tokens: list[int] = []
        for word in _words(clean(text)):
            found = self._known.get(word)
            if found is None:
                found = self._known[word] = [self._number[symbol] for symbol in self._join(word)]
            tokens += found
        return tokens

    def encode_batch(self, texts: Iterable[str]) -> Tensor:
        """[N, L] int64 rows of `context` tokens; a text that is too long loses its end, but never the end token."""
        start, end = self.vocab_size - 2, self.vocab_size - 1
        return _rows(map(self.encode, texts), context=self.context, start=start, end=end)

    def _join(self, word: str) -> list[str]:
        """Symbols of the word once no rule applies any more."""
        symbols = [self._symbol[byte] for byte in word.encode()]
        symbols[-1] += _WORD_END
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self._rank.get(pair, len(self._rank)))
            if best not in self._rank:
                break
            joined, i = [], 0
            while i < len(symbols):
                width = 2 if (symbols[i], *symbols[i + 1 : i + 2]) == best else 1
                joined.append("".join(symbols[i : i + width]))
                i += width
            symbols = joined
        return symbols


def read_tokenizer(path: Path, *, context: int = CONTEXT) -> BytePairTokenizer:
    """CLIP's tokenizer from bpe_simple_vocab_16e6.txt.gz, or from that file unpacked.

    Raises TokenizerError where there is none, or another one.
    """
    where = (
        "it is bpe_simple_vocab_16e6.txt.gz, the vocabulary file of OpenAI's CLIP repository; give the path of a copy, "
        "or use the byte-level tokenizer where no pretrained text tower is needed"
    )
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        lines = data.decode("utf-8").split("\n")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise TokenizerError(f"{path}: no vocabulary of CLIP here ({error.strerror}); {where}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: not readable as a vocabulary of CLIP ({error}); {where}") from None
    pairs = []
    for number, line in enumerate(lines[1 : _MERGES + 1], start=2):  # the first line is a header
        parts = line.split()
        if len(parts) != 2:
            raise TokenizerError(f"{path}, line {number}: expected two symbols, found {line[:40]!r}; {where}")
        pairs.append((parts[0], parts[1]))
    if len(pairs) < _MERGES:
        raise TokenizerError(f"{path}: expected {_MERGES:,} pairs after the first line, found {len(pairs):,}; {where}")
    return BytePairTokenizer(pairs, context)


def clean(text: str) -> str:
    """The text as CLIP reads it: entities such as &amp; resolved (twice), blanks single, lower case."""
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)))
    return " ".join(text.split()).lower()


def _words(text: str) -> list[str]:
    """Pieces of a cleaned text that are joined each on its own; blanks are dropped."""
    pieces = _PIECE.findall(text)
    if text.isascii():
        return pieces
    words = []
    for piece in pieces:
        if piece[0].isalnum() and not piece.isalpha():
            for is_letters, run in groupby(piece, str.isalpha):
                part = "".join(run)
                words += [part] if is_letters else list(part)
        else:
            words.append(piece)
    return words


def _byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in the file: itself, or one above 255 where it has none.

    In the order of the vocabulary: printable bytes first.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _rows(encoded: Iterable[list[int]], *, context: int, start: int, end: int) -> Tensor:
    flat = array("q")
    for tokens in encoded:
        row = [start, *tokens[: context - 2], end]
        flat.extend(row + [0] * (context - len(row)))
    if not flat:
        return torch.empty(0, context, dtype=torch.int64)
    return torch.frombuffer(flat, dtype=torch.int64).view(-1, context)
