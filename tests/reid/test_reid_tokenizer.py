"""Tokens are those of CLIP's rules read slowly and literally, and of transformers; rows keep their end."""

import gzip
import random
import unicodedata

import pytest
import torch

from apps.reid.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    TokenizerError,
    clean,
    read_tokenizer,
)

VOCABULARY = "clip-bpe/bpe_simple_vocab_16e6.txt.gz"
# fmt: off
WORDS = [
    "a", "the", "woman", "person's", "she's", "they're", "isn't", "i'd", "we'll", "wearing", "DARK-blue", "Jacket,",
    "jeans;", "(short)", "black", "hair", "and", "carrying", "red", "backpack!", "shoulder...", "white", "24", "30%",
    "t-shirt", '"logo"', "A&B", "walking/standing", "3/4", "sunglasses?", "#1", "***", "skirt_pleated", "1980s",
]
ODD = [
    "\u00e9", "e\u0301", "\u00bd", "\u00b2", "\u2167", "\u4e00", "\u65e5\u672c", "\u0442\u0435\u043a\u0441\u0442",
    "\U0001f642", "\u2014", "\u2019", "\u00df", "_", "'", "''", "'S", "<|endoftext|>", "\t", "\n", "\u00a0",
    "\u0660\u0661", "\u0d30\u0d46",
]
# fmt: on


def corpus(count: int) -> list[str]:
    draw = random.Random(7)
    texts = []
    for _ in range(count):
        pieces = [draw.choice(WORDS if draw.random() < 0.8 else ODD) for _ in range(draw.randint(0, 40))]
        texts.append("".join(piece + draw.choice([" ", " ", " ", "", "  "]) for piece in pieces))
    return texts


def symbols_of_bytes() -> dict[int, str]:
    symbols, spare = {}, 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            symbols[byte] = chr(byte)
        else:
            symbols[byte] = chr(spare)
            spare += 1
    return symbols


def vocabulary_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    symbols = sorted(symbols_of_bytes().values())  # printable bytes come first, and the others in their order
    parts = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {part: number for number, part in enumerate(parts)}


def kind(character: str) -> str:
    category = unicodedata.category(character)[0]
    return "blank" if character.isspace() else category if category in "LN" else "other"


def slow_pieces(text: str) -> list[str]:
    """Left to right, what CLIP's regular expression says."""
    pieces, i = [], 0
    while i < len(text):
        fixed = ["<|startoftext|>", "<|endoftext|>", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
        special = next((word for word in fixed if text.startswith(word, i)), None)
        if special is not None:
            end = i + len(special)
        else:
            end = i + 1
            while kind(text[i]) in ("L", "other") and end < len(text) and kind(text[end]) == kind(text[i]):
                end += 1
        if kind(text[i]) != "blank":
            pieces.append(text[i:end])
        i = end
    return pieces


def slow_encode(text: str, merges: list[tuple[str, str]], number: dict[str, int]) -> list[int]:
    """Every rule in turn, over the whole word, for every word."""
    symbols, ids = symbols_of_bytes(), []
    for piece in slow_pieces(text):
        if piece in ("<|startoftext|>", "<|endoftext|>"):
            ids.append(number[piece])
            continue
        parts = [symbols[byte] for byte in piece.encode()]
        parts[-1] += "</w>"
        present = set(parts)
        for first, second in merges:
            if first not in present or second not in present:
                continue
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (first, second):
                    parts[i : i + 2] = [first + second]
                i += 1
            present = set(parts)
        ids += [number[part] for part in parts]
    return ids


def some_merges() -> list[tuple[str, str]]:
    """Rules learnt from the words above: the most frequent pair again and again."""
    symbols = symbols_of_bytes()
    words = [[symbols[b] for b in piece.encode()] for word in WORDS + ODD for piece in slow_pieces(clean(word))]
    for word in words:
        word[-1] += "</w>"
    merges = []
    for _ in range(120):
        counts: dict[tuple[str, str], int] = {}
        for word in words:
            for i in range(len(word) - 1):
                counts[word[i], word[i + 1]] = counts.get((word[i], word[i + 1]), 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in words:
            for i in range(len(word) - 1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    return merges


def real_merges(path) -> list[tuple[str, str]]:
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    return [(line.split()[0], line.split()[1]) for line in lines]


def test_tokens_are_those_of_the_rules_applied_one_after_another():
    merges = some_merges()
    tokenizer = BytePairTokenizer(merges)
    assert tokenizer.vocab_size == len(vocabulary_of(merges))
    texts, number = corpus(300), vocabulary_of(merges)
    assert [tokenizer.encode(text) for text in texts] == [slow_encode(clean(text), merges, number) for text in texts]
    longest = max(texts, key=len)
    assert max(map(len, map(tokenizer.encode, texts))) < len(longest.encode()), "no rule was ever applied"


def test_tokens_of_the_real_vocabulary_are_known(real_data):
    tokenizer = read_tokenizer(real_data(VOCABULARY))
    assert tokenizer.vocab_size == 49408
    rows = tokenizer.encode_batch(["hello world!", "a photo of a cat"])
    assert rows[:, :8].tolist() == [
        [49406, 3306, 1002, 256, 49407, 0, 0, 0],
        [49406, 320, 1125, 539, 320, 2368, 49407, 0],
    ]


def test_tokens_of_the_real_vocabulary_are_those_of_the_rules(real_data):
    path = real_data(VOCABULARY)
    tokenizer, merges = read_tokenizer(path), real_merges(path)
    words, number = [*WORDS, *ODD, *map("".join, zip(WORDS, ODD, strict=False))], vocabulary_of(merges)
    assert [tokenizer.encode(word) for word in words] == [slow_encode(clean(word), merges, number) for word in words]


def test_tokens_equal_those_of_transformers(real_data):
    transformers = pytest.importorskip("transformers")
    path = real_data(VOCABULARY)
    tokenizer, merges = read_tokenizer(path), real_merges(path)
    theirs = transformers.CLIPTokenizer(vocab=vocabulary_of(merges), merges=merges)
    # transformers looks for special tokens first, CLIP only where a piece begins
    texts = [text.replace("<|endoftext|>", " <|endoftext|> ") for text in corpus(1500)]
    assert [tokenizer.encode(text) for text in texts] == [ids[1:-1] for ids in theirs(texts)["input_ids"]]
    cut = theirs(texts, truncation=True, max_length=77)["input_ids"]
    rows = tokenizer.encode_batch(texts).tolist()
    assert [row[: len(ids)] for row, ids in zip(rows, cut, strict=True)] == cut


def test_text_is_cleaned_as_clip_does():
    assert clean("  A  Woman\n&amp;amp; a  MAN \u00a0 &lt;3 ") == "a woman & a man <3"
    assert clean("cafe\u0301 cafe&#769;") == "caf\u00e9 caf\u00e9"


def test_numbers_stand_alone_and_words_with_them_are_split():
    tokenizer = BytePairTokenizer([])
    split = [tokenizer.encode(text) for text in ("a 1 2 b", "a12b", "a \u00bd b", "a\u00bdb")]
    assert split[0] == split[1]
    assert split[2] == split[3]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(20), BytePairTokenizer([("a", "b</w>")], 20)])
def test_rows_are_start_text_end_and_zeros(tokenizer):
    rows = tokenizer.encode_batch(["", "ab ab", "x" * 100])
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert rows.dtype == torch.int64
    assert rows.shape == (3, 20)
    assert rows[:, 0].tolist() == [start] * 3
    assert rows[0].tolist() == [start, end] + [0] * 18
    for row, text in zip(rows.tolist(), ["", "ab ab", "x" * 100], strict=True):
        inner = tokenizer.encode(text)[:18]
        assert row[: len(inner) + 2] == [start, *inner, end]
        assert not any(row[len(inner) + 2 :])
    # the text tower finds the end as the highest number
    assert rows.argmax(1).tolist() == [1, 1 + len(tokenizer.encode("ab ab")), 19]
    assert tokenizer.encode_batch([]).shape == (0, 20)


def test_rows_fit_into_16_bits(real_data):
    rows = read_tokenizer(real_data(VOCABULARY)).encode_batch(corpus(50))
    assert rows.to(torch.uint16).to(torch.int64).equal(rows)


def test_every_byte_is_a_token_of_the_fallback():
    assert ByteTokenizer().encode("A\u00e9 \U0001f642") == list("a\u00e9 \U0001f642".encode())
    assert ByteTokenizer.vocab_size == 256 + 2


def test_an_unpacked_vocabulary_is_read_too(real_data, tmp_path):
    packed = real_data(VOCABULARY)
    plain = tmp_path / "vocabulary.txt"
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    text = "a woman in a red coat"
    assert read_tokenizer(plain).encode(text) == read_tokenizer(packed).encode(text)


def test_a_missing_vocabulary_is_an_error_that_says_where_it_usually_comes_from(tmp_path):
    for path in (tmp_path / "none.txt.gz", tmp_path):
        with pytest.raises(TokenizerError, match="the vocabulary file of OpenAI's CLIP repository") as caught:
            read_tokenizer(path)
        assert str(path) in str(caught.value)
        assert "bpe_simple_vocab_16e6.txt.gz" in str(caught.value)
        assert "byte-level" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'"version"\ni n\nt h\n', r"line 4: expected two symbols, found ''"),
        (b'"version"\ni n\nt h</w> x\n', r"line 3: expected two symbols, found 't h</w> x'"),
        (b'"version"\n' + b"i n\n" * 10 + b"i n", r"expected 48,894 pairs after the first line, found 11"),
        (gzip.compress(b"i n\n" * 100)[:-20], "not readable as a vocabulary"),
        (b"\x1f\x8b rubbish", "not readable as a vocabulary"),
        (b"\xff\xfe\x00", "not readable as a vocabulary"),
    ],
)
def test_another_file_is_an_error_that_names_line_and_reason(tmp_path, data, message):
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(path)
