"""Tokens and integers are those that Python's own split and int find."""

import random
import re
from itertools import pairwise

import pytest
import torch

from shared.tokens import Table, integers, tokenise


def rows_of(table: Table) -> list[list[str]]:
    ptr = table.ptr.tolist()
    texts = table.texts(torch.arange(ptr[-1]))
    assert texts == [table.text(token) for token in range(ptr[-1])]
    return [texts[begin:end] for begin, end in pairwise(ptr)]


def random_text(seed: int, alphabet: str) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 60)))


@pytest.mark.parametrize("seed", range(20))
def test_tokens_stand_between_runs_of_blanks(seed):
    text = random_text(seed, "ab12- \t\v\f\u00e9\n\n")
    table = tokenise(text.encode(), tabs=False)
    # str.split would also take the blanks of Unicode, which stay inside a token here
    assert rows_of(table) == [re.findall(r"[^ \t\v\f]+", line) for line in text.split("\n")]


@pytest.mark.parametrize("seed", range(20))
def test_tokens_stand_between_single_tabs_and_may_be_empty(seed):
    text = random_text(seed, "ab1 \t\t\u00e9\n")
    assert rows_of(tokenise(text.encode(), tabs=True)) == [line.split("\t") for line in text.split("\n")]


def test_a_rows_text_goes_from_its_first_to_its_last_token():
    table = tokenise(b"  a  b \n\n c", tabs=False)
    assert [table.row_text(row) for row in range(3)] == ["a  b", "", "c"]


def test_integers_are_those_that_python_prints():
    numbers = ["0", "7", "-7", "123", "-123", "9" * 18, "-" + "9" * 18, "10", "100000"]
    others = ["-0", "007", "-01", "+7", "1.0", "1e3", "-", "--1", "1-", "x", "9" * 19, "\u0661", "1_0", "-x"]
    table = tokenise(" ".join(numbers + others).encode(), tabs=False)
    value, is_plain = integers(table, torch.arange(len(numbers) + len(others)))
    assert is_plain.tolist() == [True] * len(numbers) + [False] * len(others)
    assert value[: len(numbers)].tolist() == list(map(int, numbers))


@pytest.mark.parametrize("seed", range(5))
def test_random_integers_come_back_in_any_order(seed):
    draw = random.Random(seed)
    numbers = [draw.randint(-(10 ** draw.randint(1, 18)) + 1, 10 ** draw.randint(1, 18) - 1) for _ in range(50)]
    table = tokenise("\n".join(map(str, numbers)).encode(), tabs=False)
    asked = torch.tensor(draw.choices(range(50), k=30))
    value, is_plain = integers(table, asked)
    assert bool(is_plain.all())
    assert value.tolist() == [numbers[n] for n in asked.tolist()]


def test_an_empty_field_is_no_integer_and_no_tokens_give_none():
    table = tokenise(b"1\t\t2\n\t", tabs=True)
    value, is_plain = integers(table, torch.arange(5))
    assert is_plain.tolist() == [True, False, True, False, False]
    assert value[is_plain].tolist() == [1, 2]
    value, is_plain = integers(table, torch.empty(0, dtype=torch.int64))
    assert (value.numel(), is_plain.numel()) == (0, 0)
