"""Negatives for a batch of rows: exact, distinct within a row, never an excluded item, the same on every device.

Axes: B rows (users) of a batch, N negatives, C candidates, I items, K excluded entries of all rows, E those of the
batch, G those of them that lie near the beginning of their row's stream, T weighted draws of a row, P rows of a pool.

What a row gets depends on (seed, epoch), the row's exclusions and its `position`, a number that no two draws of an
epoch share, as the index of the training pair. It does not depend on the rest of the batch, on chunks, workers, world
size, device or torch's global generators: everything is integer arithmetic on tables made once per epoch.

Uniform negatives. An epoch draws three random permutations p1, p2, p3 of the C candidates. A row hashes its position
to shifts a, b, c and reads the stream p3[p2[p1[x + a] + b] + c] at x = 0, 1, ..., indices modulo C. Its negatives are
the first N elements that are not excluded; those found at x >= N stand where the excluded ones stood. No negative is
looked up among the row's exclusions: the exclusions, fewer than the negatives as a rule, are sent backwards through the
permutations, and the few of them that come out near the beginning of the stream are the gaps to be filled.

Each row is an exact simple random sample without replacement: p3 is uniform, so for any shifts the stream is a
uniformly random order of the candidates; where in it the excluded items lie decides which places are read, and
whichever these are, the allowed items lie there in uniformly random order. So every column alone is uniform too, and a
row with hardly any allowed item needs no other method. Dependent are the rows of one epoch, but weakly, through the
shared tables: the streams of two rows are moved copies of each other where b and c agree, which happens to one pair of
rows in C ** 2; otherwise how many items they have in common is distributed nearly as for independent rows. Different
epochs have independent tables.

Negatives by popularity follow another law, successive sampling: one item after the other, each with probability
proportional to its weight among the allowed items not yet taken. To skip what is excluded or repeated in a stream of
independent weighted draws gives exactly that; rows share nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from shared.ranking import Lists
from shared.seed import fold, make_generator

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the constants of splitmix64 as signed numbers
_FACTOR_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_FACTOR_2 = 0x94D049BB133111EB - (1 << 64)

_STREAM = 1 << 20  # far from the small numbers that callers give their own streams
_SHARED, _WEIGHTED = _STREAM + 1, _STREAM + 2

_MAX_ITEMS = 1 << 30  # an index plus a shift fits int32
_CPU_CELLS = 1 << 19  # negatives, draws or excluded entries handled at once: their buffers stay in the caches
_CUDA_CELLS = 1 << 22

_WEIGHT_BITS = 40  # weights are multiples of 2**-40 of their sum
_ROUNDS = 4  # so often the number of a row's weighted draws is doubled before its last items are drawn one by one


@dataclass(frozen=True)
class NegativeSampler:
    """What may be drawn for whom, on one device; made by make_sampler."""

    candidates: Tensor  # [C] int32, rising
    exclude: Lists  # per row, the candidates it must not get, rising: [rows + 1] int64, [K] int32
    num_items: int
    max_excluded: int  # of one row

    @property
    def max_negatives(self) -> int:
        """The largest number of negatives that every row has."""
        return self.candidates.numel() - self.max_excluded


class Permutations(NamedTuple):
    """The tables of one epoch. Those of 2 C are written out twice, so that index plus shift needs no modulo."""

    first: Tensor  # [2 C] int32
    second: Tensor  # [2 C] int32
    third: Tensor  # [2 C] int32, item ids
    first_inverse: Tensor  # [2 C] int32
    second_inverse: Tensor  # [2 C] int32
    excluded: Tensor  # [K] int32, where in the third the sampler's excluded items stand
    key: int  # of the hash that gives the shifts


class Popularity(NamedTuple):
    """Item weights as stretches of the numbers below 2**40, in the order of the candidates."""

    end: Tensor  # [C] int64, one past the stretch
    slot: Tensor  # [2**n] int32: the item to which all of this part of the numbers belongs, -1 if to several


def make_sampler(
    exclude: Lists, *, num_items: int, candidates: Tensor | None = None, device: torch.device | str = "cpu"
) -> NegativeSampler:
    """The sampler of rows that must not get their items in `exclude`, which rise within each row.

    `candidates` ([C] distinct ids; all items by default) are what is drawn from: leave out cold items. Excluded items
    that are no candidates are dropped.
    """
    if not 0 < num_items <= _MAX_ITEMS:
        raise ValueError(f"num_items is {num_items}; negatives are drawn from 1 to {_MAX_ITEMS} items")
    candidate_C = torch.arange(num_items) if candidates is None else candidates.long().cpu().sort().values
    if not candidate_C.numel():
        raise ValueError("candidates is empty, so that nothing can be drawn; pass the ids of the items to draw from")
    _check_ids("candidates", candidate_C, num_items)
    if not (candidate_C.diff() > 0).all():
        raise ValueError("candidates holds an id twice; pass each of them once")
    ptr, item_K = exclude.ptr.long().cpu(), exclude.item.cpu()
    _check_exclude(ptr, item_K, num_items)
    item_K = item_K.int()
    if candidate_C.numel() < num_items:
        is_candidate_I = torch.zeros(num_items, dtype=torch.bool).index_fill_(0, candidate_C, True)
        keep_K = is_candidate_I.index_select(0, item_K)
        ptr = torch.cat([ptr.new_zeros(1), keep_K.cumsum(0)])[ptr]
        item_K = item_K[keep_K]
    longest = int(ptr.diff().max()) if ptr.numel() > 1 else 0
    return NegativeSampler(candidate_C.int().to(device), Lists(ptr.to(device), item_K.to(device)), num_items, longest)


def require_candidates(sampler: NegativeSampler, num_negatives: int) -> None:
    """Raise a ValueError, with how many rows and what would work, if any row has fewer candidates than negatives."""
    _check_room(sampler, sampler.exclude.ptr.diff(), num_negatives)


def permutations(sampler: NegativeSampler, *, seed: int, epoch: int) -> Permutations:
    """The tables of one epoch, on the sampler's device."""
    candidate_C = sampler.candidates
    place_C = torch.arange(candidate_C.numel(), dtype=torch.int32, device=candidate_C.device)
    generator = make_generator(seed, epoch=epoch, stream=_STREAM)  # on the CPU, since CUDA draws other numbers
    first, second, third = (
        torch.randperm(candidate_C.numel(), generator=generator, dtype=torch.int32).to(candidate_C.device)
        for _ in range(3)
    )
    item = candidate_C.index_select(0, third)
    place_I = torch.empty(sampler.num_items, dtype=torch.int32, device=candidate_C.device)
    place_I.index_copy_(0, item.long(), place_C)
    return Permutations(
        first.repeat(2),
        second.repeat(2),
        item.repeat(2),
        torch.empty_like(first).index_copy_(0, first.long(), place_C).repeat(2),
        torch.empty_like(first).index_copy_(0, second.long(), place_C).repeat(2),
        place_I.index_select(0, sampler.exclude.item),
        fold(seed, epoch, _STREAM),
    )


def draw(
    sampler: NegativeSampler, tables: Permutations, row_B: Tensor, position_B: Tensor, num_negatives: int
) -> Tensor:
    """Uniform distinct negatives of each row, [B, N] int32; row and position are int64.

    A row with too few candidates raises a ValueError; where require_candidates has passed, asking costs nothing. A few
    thousand rows at a time cost least per negative. With CUDA the host waits three or four times in a call, for the
    numbers of exclusions, of those near the beginning and of gaps.
    """
    _check_rows(sampler, row_B, num_negatives)
    out_BN = torch.empty(len(row_B), num_negatives, dtype=torch.int32, device=row_B.device)
    for low, high in _spans(len(row_B), num_negatives, row_B.device):
        shift_3B = _shifts(tables.key, position_B[low:high], sampler.candidates.numel())
        _read_beginning(tables, shift_3B, out_BN[low:high])
        _fill_gaps(sampler, tables, row_B[low:high], shift_3B, out_BN[low:high])
    return out_BN


def draw_shared(sampler: NegativeSampler, tables: Permutations, position: int, num_negatives: int) -> Tensor:
    """Uniform distinct candidates for all rows of a step to share, [N] int32; shared_excluded tells whose they are.

    `position` is the step; it may equal a position given to `draw`.
    """
    count, device = sampler.candidates.numel(), sampler.candidates.device
    if not 0 < num_negatives <= count:
        raise ValueError(f"num_negatives is {num_negatives}; shared ones are drawn from {count} candidates, 1 to all")
    out_1N = torch.empty(1, num_negatives, dtype=torch.int32, device=device)
    key = fold(tables.key, _SHARED)
    _read_beginning(tables, _shifts(key, torch.full((1,), position, device=device), count), out_1N)
    return out_1N[0]


def shared_excluded(sampler: NegativeSampler, row_B: Tensor, item_N: Tensor) -> Tensor:
    """Whether a shared negative is excluded for a row, [B, N] bool; the N candidates must differ from one another."""
    width = item_N.numel()
    column_I = torch.full((sampler.num_items,), width, dtype=torch.int32, device=item_N.device)
    column_I.index_copy_(0, item_N.long(), torch.arange(width, dtype=torch.int32, device=item_N.device))
    row_E, entry_E = _entries(*_stretches(sampler, row_B))
    column_E = column_I.index_select(0, sampler.exclude.item.index_select(0, entry_E))
    # One column more takes the exclusions that are not shared, which cost more to leave out.
    excluded_BM = torch.zeros(len(row_B), width + 1, dtype=torch.bool, device=item_N.device)
    excluded_BM.view(-1).index_fill_(0, row_E.long() * (width + 1) + column_E, True)
    return excluded_BM[:, :width]


def is_excluded(sampler: NegativeSampler, row_B: Tensor, item_BN: Tensor) -> Tensor:
    """Whether each candidate is excluded for its row, [B, N] bool, by binary search in the row's exclusions."""
    item_K = sampler.exclude.item
    if not item_K.numel():
        return torch.zeros_like(item_BN, dtype=torch.bool)
    start_B, size_B = _stretches(sampler, row_B)
    size_B1 = size_B.unsqueeze(1)
    at_BN = start_B.clamp(max=item_K.numel() - 1).unsqueeze(1).expand_as(item_BN).clone()
    for _ in range(max(0, sampler.max_excluded - 1).bit_length()):
        half_B1 = size_B1 >> 1
        # Negative where the entry in the middle is at most the item: the sign, as a mask, selects the upper half.
        above_BN = _take(item_K, at_BN + half_B1).sub_(item_BN).sub_(1)
        at_BN += (above_BN >> 31) & half_B1
        size_B1 = size_B1 - half_B1
    return (_take(item_K, at_BN) == item_BN) & (size_B1 > 0)


def popularity(sampler: NegativeSampler, count_I: Tensor, power: float) -> Popularity:
    """The table of weights max(count, 1) ** power, [I] counts, as multiples of 2**-40 of their sum (never none)."""
    if count_I.shape != (sampler.num_items,):
        raise ValueError(f"count_I has shape {tuple(count_I.shape)}; {sampler.num_items} items need as many counts")
    if not 0 <= power < torch.inf:
        raise ValueError(f"power is {power}; weights need a finite power that is not negative")
    candidate_C = sampler.candidates.cpu()
    number_C = torch.arange(1, candidate_C.numel() + 1)
    log_C = count_I.cpu().double().index_select(0, candidate_C).clamp(min=1).log() * power
    sum_C = (log_C - log_C.max()).exp().cumsum(0)  # scaled, so that no power of a count overflows
    end_C = (sum_C / sum_C[-1] * ((1 << _WEIGHT_BITS) - candidate_C.numel())).round().long() + number_C
    slot_bits = min(24, max(12, candidate_C.numel().bit_length() + 6))
    width = 1 << (_WEIGHT_BITS - slot_bits)
    first_C = torch.cat([end_C.new_zeros(1), end_C[:-1]]).add(width - 1) // width
    whole_C = (end_C // width - first_C).clamp(min=0)  # slots that belong to the item alone
    is_whole = torch.ones(1 << slot_bits, dtype=torch.bool).index_fill_(0, end_C[end_C % width > 0] // width, False)
    slot = torch.full((1 << slot_bits,), -1, dtype=torch.int32)
    slot[is_whole] = candidate_C.repeat_interleave(whole_C)
    return Popularity(end_C.to(sampler.candidates.device), slot.to(sampler.candidates.device))


def draw_popular(
    sampler: NegativeSampler,
    table: Popularity,
    row_B: Tensor,
    position_B: Tensor,
    num_negatives: int,
    *,
    seed: int,
    epoch: int,
) -> Tensor:
    """Distinct negatives of each row by successive sampling with the table's weights, [B, N] int32.

    Arguments and errors as in `draw`. The columns are in the order drawn: the first tend to be the most popular.
    """
    _check_rows(sampler, row_B, num_negatives)
    hash_B = _hash(fold(seed, epoch, _WEIGHTED), position_B)
    out_BN = torch.empty(len(row_B), num_negatives, dtype=torch.int32, device=row_B.device)
    count_B = torch.zeros(len(row_B), dtype=torch.int64, device=row_B.device)
    open_B = torch.arange(len(row_B), device=row_B.device)
    num_draws = num_negatives + num_negatives // 2 + 16
    for _ in range(_ROUNDS):
        if not len(open_B):
            return out_BN
        # A draw has several int64 beside it and a row one mark for each item, hence fewer rows at once.
        spans = _spans(len(open_B), max(4 * num_draws, sampler.num_items // 32), row_B.device)
        mark = torch.empty(spans[0][1] * sampler.num_items, dtype=torch.int32, device=row_B.device)
        for low, high in spans:
            part = open_B[low:high]
            item_bT = _weighted_draws(sampler, table, hash_B[part], num_draws)
            out_BN[part], count_B[part] = _first_distinct(sampler, row_B[part], item_bT, num_negatives, mark)
        open_B = open_B[count_B[open_B] < num_negatives]
        num_draws *= 2
    for low, high in _spans(len(open_B), sampler.candidates.numel(), row_B.device):
        part = open_B[low:high]
        out_BN[part] = _draw_rest(sampler, table, row_B[part], hash_B[part], num_draws, out_BN[part], count_B[part])
    return out_BN


def pool_bytes(num_rows: int, num_negatives: int, num_items: int) -> int:
    """What draw_pool's result takes: two bytes a negative where all ids fit them, else four."""
    return num_rows * num_negatives * _pool_dtype(num_items).itemsize


def pool_epoch(epoch: int, resample_epochs: int) -> int:
    """The epoch whose pool is in use: drawn anew every so many epochs, or for 0 once."""
    return epoch // resample_epochs * resample_epochs if resample_epochs else 0


def draw_pool(
    sampler: NegativeSampler,
    row_P: Tensor,
    num_negatives: int,
    *,
    seed: int,
    epoch: int,
    chunk: int = 4096,
    on_rows: Callable[[int], None] = lambda done: None,
    table: Popularity | None = None,
) -> Tensor:
    """The negatives of all rows at once, [P, N] int16 (ids below 2**15) or int32: row p is that of position p.

    It equals what `draw`, or with a table `draw_popular`, gives for the same rows and positions in that epoch. on_rows
    is called after every chunk of rows, with the number of rows done.
    """
    if table is None:
        draw_rows = partial(draw, sampler, permutations(sampler, seed=seed, epoch=epoch))
    else:
        draw_rows = partial(draw_popular, sampler, table, seed=seed, epoch=epoch)
    device = sampler.candidates.device
    pool_PN = torch.empty(len(row_P), num_negatives, dtype=_pool_dtype(sampler.num_items), device=device)
    for low in range(0, len(row_P), chunk):
        high = min(low + chunk, len(row_P))
        row_B = row_P[low:high].to(device, torch.int64)
        pool_PN[low:high] = draw_rows(row_B, torch.arange(low, high, device=device), num_negatives)
        on_rows(high)
    return pool_PN


def _mix(number: Tensor) -> Tensor:
    """splitmix64's finaliser, in place, on int64 that wrap around; masks take away the sign that >> brings in."""
    number ^= (number >> 30).bitwise_and_((1 << 34) - 1)
    number *= _FACTOR_1
    number ^= (number >> 27).bitwise_and_((1 << 37) - 1)
    number *= _FACTOR_2
    number ^= (number >> 31).bitwise_and_((1 << 33) - 1)
    return number


def _high_bits(number: Tensor, bits: int) -> Tensor:
    return (number >> (64 - bits)).bitwise_and_((1 << bits) - 1)


def _hash(start: Tensor | int, step: Tensor) -> Tensor:
    """The number after so many steps of splitmix64 from its start."""
    return _mix(step.long() * _GOLDEN + start)


def _shifts(key: int, position_B: Tensor, count: int) -> Tensor:
    """Three numbers below count for every position, [3, B] int32."""
    hash_B = _hash(key, position_B)
    low_bits = (1 << 32) - 1
    bits_3B = torch.stack([hash_B, hash_B >> 32, _hash(hash_B, torch.ones_like(hash_B))]) & low_bits
    return ((bits_3B * count) >> 32).int()


def _take(table: Tensor, index: Tensor) -> Tensor:
    # On CPUs index_select of one axis costs a fraction of take, gather or indexing.
    return table.index_select(0, index.view(-1)).view(index.shape)


def _read_beginning(tables: Permutations, shift_3B: Tensor, out_BN: Tensor) -> None:
    """Write the first N elements of every row's stream to out_BN."""
    # The first lookup reads N neighbours: copying them beats looking them up.
    x_BN = tables.first.unfold(0, out_BN.shape[1], 1).index_select(0, shift_3B[0])
    x_BN += shift_3B[1].unsqueeze(1)
    x_BN = _take(tables.second, x_BN)
    x_BN += shift_3B[2].unsqueeze(1)
    torch.index_select(tables.third, 0, x_BN.view(-1), out=out_BN.view(-1))


def _fill_gaps(sampler: NegativeSampler, tables: Permutations, row_B: Tensor, shift_3B: Tensor, out_BN: Tensor) -> None:
    """Replace what is excluded among the first N elements of every row's stream, in place."""
    if not sampler.exclude.item.numel():
        return
    num_rows, num_negatives = len(sampler.exclude.ptr) - 1, out_BN.shape[1]
    if sampler.exclude.item.numel() <= 2 * num_negatives * num_rows:
        _replace_excluded(sampler, tables, row_B, shift_3B, out_BN)
        return
    # With many exclusions and few negatives it is cheaper to find first the rows where something is to be replaced.
    hit_b = is_excluded(sampler, row_B, out_BN).any(1).nonzero().squeeze(1)
    out_bN = out_BN.index_select(0, hit_b)
    _replace_excluded(sampler, tables, row_B.index_select(0, hit_b), shift_3B.index_select(1, hit_b), out_bN)
    out_BN.index_copy_(0, hit_b, out_bN)


def _replace_excluded(
    sampler: NegativeSampler, tables: Permutations, row_B: Tensor, shift_3B: Tensor, out_BN: Tensor
) -> None:
    start_B, size_B = _stretches(sampler, row_B)
    num_entries = int(size_B.sum())
    if num_entries > _cells(row_B.device) and len(row_B) > 1:
        half = len(row_B) // 2
        _replace_excluded(sampler, tables, row_B[:half], shift_3B[:, :half], out_BN[:half])
        _replace_excluded(sampler, tables, row_B[half:], shift_3B[:, half:], out_BN[half:])
        return
    count, num_negatives = sampler.candidates.numel(), out_BN.shape[1]
    # Where in the stream do the excluded items stand? Backwards through the permutations, shifts subtracted.
    row_E, entry_E = _entries(start_B, size_B, num_entries)
    back_3B = count - shift_3B
    x_E = tables.excluded.index_select(0, entry_E).add_(back_3B[2].index_select(0, row_E))
    x_E = tables.second_inverse.index_select(0, x_E).add_(back_3B[1].index_select(0, row_E))
    x_E = tables.first_inverse.index_select(0, x_E).sub_(shift_3B[0].index_select(0, row_E))
    x_E += (x_E >> 31) & count  # modulo
    # Only so many places of a row's stream can be read: even if all its exclusions stand among them, N others do too.
    reach_E = (size_B + num_negatives).int().index_select(0, row_E)
    near_G = (x_E < reach_E).nonzero().squeeze(1)
    if not len(near_G):
        return
    row_G = row_E.index_select(0, near_G).long()
    key_G = (row_G * count + x_E.index_select(0, near_G)).sort().values
    row_G = key_G // count
    x_G = key_G - row_G * count
    index_G = torch.arange(len(key_G), device=key_G.device)
    first_G = torch.where(row_G != row_G.roll(1), index_G, 0).cummax(0).values  # index of the row's first entry
    order_G = index_G - first_G
    # Of a row's m gaps the k-th (k = 0, 1, ...) gets the allowed element of rank N - 1 - k: ranks N - m .. N - 1 stand
    # behind place N - 1. Element x, excluded, has x - order allowed ones before it; so the one of rank r stands at
    # r plus the number of excluded ones with x - order <= r.
    gap = (x_G < num_negatives).nonzero().squeeze(1)
    row, rank = row_G.index_select(0, gap), num_negatives - 1 - order_G.index_select(0, gap)
    passed = torch.searchsorted(key_G - order_G, row * count + rank, right=True) - first_G.index_select(0, gap)
    shift_3 = shift_3B.index_select(1, row)
    place = tables.first.index_select(0, rank + passed + shift_3[0])
    place = tables.second.index_select(0, place + shift_3[1])
    item = tables.third.index_select(0, place + shift_3[2])
    out_BN.view(-1).index_copy_(0, row * num_negatives + x_G.index_select(0, gap), item)


def _stretches(sampler: NegativeSampler, row_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's exclusions begin and how many there are: indices of exclude.item, int32 where they fit."""
    ptr, item_K = sampler.exclude
    start_B = ptr.index_select(0, row_B)
    size_B = ptr.index_select(0, row_B + 1) - start_B
    dtype = torch.int32 if item_K.numel() < 1 << 31 else torch.int64
    return start_B.to(dtype), size_B.to(dtype)


def _entries(start_B: Tensor, size_B: Tensor, num_entries: int | None = None) -> tuple[Tensor, Tensor]:
    """For every exclusion of the rows: the row's place in the batch and the exclusion's own in exclude.item."""
    row_E = torch.repeat_interleave(size_B, output_size=num_entries)
    offset_B = start_B - size_B.cumsum(0, dtype=size_B.dtype) + size_B
    entry_E = torch.arange(len(row_E), dtype=size_B.dtype, device=size_B.device)
    return row_E, entry_E.add_(offset_B.index_select(0, row_E))


def _weighted_draws(sampler: NegativeSampler, table: Popularity, hash_B: Tensor, num_draws: int) -> Tensor:
    """The first T independent weighted draws of every row's stream, [B, T] int32."""
    step_T = torch.arange(num_draws, device=hash_B.device)
    number_BT = _high_bits(_hash(hash_B.unsqueeze(1), step_T), _WEIGHT_BITS)
    slot_bits = table.slot.numel().bit_length() - 1
    item_BT = _take(table.slot, number_BT >> (_WEIGHT_BITS - slot_bits))
    mixed = (item_BT.view(-1) < 0).nonzero().squeeze(1)
    number = torch.searchsorted(table.end, number_BT.view(-1).index_select(0, mixed), right=True)
    item_BT.view(-1).index_copy_(0, mixed, sampler.candidates.index_select(0, number))
    return item_BT


def _first_distinct(
    sampler: NegativeSampler, row_B: Tensor, item_BT: Tensor, num_negatives: int, mark: Tensor
) -> tuple[Tensor, Tensor]:
    """The first N different allowed items of every row, [B, N] int32, and how many there are, [B] int64.

    `mark` is a buffer of B times I int32 with any contents.
    """
    num_rows, num_draws = item_BT.shape
    row_B1 = torch.arange(num_rows, device=item_BT.device).unsqueeze(1)
    cell_X = (item_BT + row_B1 * sampler.num_items).view(-1)
    draw_BT = torch.arange(num_draws, dtype=torch.int32, device=item_BT.device).expand(num_rows, -1)
    # The mark of an item becomes its first draw in the row, or -1 where it is excluded: then no draw equals it.
    mark.index_fill_(0, cell_X, num_draws)
    row_E, entry_E = _entries(*_stretches(sampler, row_B))
    mark.index_fill_(0, row_E.long() * sampler.num_items + sampler.exclude.item.index_select(0, entry_E), -1)
    mark.scatter_reduce_(0, cell_X, draw_BT.reshape(-1), "amin")
    is_new_BT = mark.index_select(0, cell_X).view(item_BT.shape) == draw_BT
    rank_BT = is_new_BT.cumsum(1, dtype=torch.int32)
    is_new_BT &= rank_BT <= num_negatives
    # One place more takes what is left out.
    place_BT = (rank_BT - 1 + row_B1 * num_negatives).masked_fill_(~is_new_BT, num_rows * num_negatives)
    out = item_BT.new_zeros(num_rows * num_negatives + 1).index_copy_(0, place_BT.view(-1), item_BT.view(-1))
    return out[:-1].view(num_rows, num_negatives), rank_BT[:, -1].clamp(max=num_negatives).long()


def _draw_rest(
    sampler: NegativeSampler,
    table: Popularity,
    row_B: Tensor,
    hash_B: Tensor,
    num_draws: int,
    out_BN: Tensor,
    count_B: Tensor,
) -> Tensor:
    """The rows of out_BN, whose first count items are drawn, with the others drawn one column after the other.

    What the draws of a stream gave so far does not change the law of the rest, so this one goes on where they ended.
    """
    weight_BC = table.end.diff(prepend=table.end.new_zeros(1)).repeat(len(row_B), 1)
    row_E, entry_E = _entries(*_stretches(sampler, row_B))
    candidate_E = torch.searchsorted(sampler.candidates, sampler.exclude.item.index_select(0, entry_E))
    weight_BC[row_E.long(), candidate_E] = 0
    column_N = torch.arange(out_BN.shape[1], device=out_BN.device)
    known, known_column = (column_N < count_B.unsqueeze(1)).nonzero(as_tuple=True)
    weight_BC[known, torch.searchsorted(sampler.candidates, out_BN[known, known_column])] = 0
    out_BN = out_BN.clone()
    for column in range(int(count_B.min()), out_BN.shape[1]):
        row = (count_B <= column).nonzero().squeeze(1)
        sum_bC = weight_BC[row].cumsum(1)
        number_b = _high_bits(_hash(hash_B[row], torch.full_like(row, num_draws + column)), 63)
        pick_b = torch.searchsorted(sum_bC, (number_b % sum_bC[:, -1]).unsqueeze(1), right=True).squeeze(1)
        weight_BC[row, pick_b] = 0
        out_BN[row, column] = sampler.candidates[pick_b]
    return out_BN


def _cells(device: torch.device) -> int:
    return _CPU_CELLS if device.type == "cpu" else _CUDA_CELLS


def _spans(num_rows: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    """Stretches of rows with a bounded number of cells each."""
    step = max(1, _cells(device) // width)
    return [(low, min(low + step, num_rows)) for low in range(0, num_rows, step)]


def _pool_dtype(num_items: int) -> torch.dtype:
    return torch.int16 if num_items <= torch.iinfo(torch.int16).max else torch.int32


def _check_rows(sampler: NegativeSampler, row_B: Tensor, num_negatives: int) -> None:
    if not 0 < num_negatives <= sampler.max_negatives:
        _check_room(sampler, _stretches(sampler, row_B)[1], num_negatives)


def _check_room(sampler: NegativeSampler, size_R: Tensor, num_negatives: int) -> None:
    """Raise if rows with so many exclusions have too few candidates."""
    if num_negatives < 1:
        raise ValueError(f"num_negatives is {num_negatives}; draw at least 1")
    left_R = sampler.candidates.numel() - size_R
    num_short = int((left_R < num_negatives).sum())
    if num_short:
        lower = f"every row has {sampler.max_negatives}: lower num_negatives to that, or "
        raise ValueError(
            f"num_negatives is {num_negatives}, but {num_short} of {len(left_R)} rows (users) have fewer candidates "
            f"left (the least: {int(left_R.min())} of {sampler.candidates.numel()}); "
            f"{lower if sampler.max_negatives > 0 else ''}leave out the rows with the most exclusions"
        )


def _check_ids(name: str, id_R: Tensor, num_items: int) -> None:
    low, high = (int(limit) for limit in id_R.aminmax())
    if low < 0 or high >= num_items:
        raise ValueError(
            f"{name} holds id {low if low < 0 else high}, expected 0 .. {num_items - 1}; number the items from 0"
        )


def _check_exclude(ptr: Tensor, item_K: Tensor, num_items: int) -> None:
    if ptr.dim() != 1 or not ptr.numel() or ptr[0] != 0 or ptr[-1] != item_K.numel() or (ptr.diff() < 0).any():
        raise ValueError(
            f"exclude.ptr must rise from 0 to the {item_K.numel()} items; build it as the sum of the counts"
        )
    if not item_K.numel():
        return
    _check_ids("exclude.item", item_K, num_items)
    is_rising = item_K.diff() > 0
    inner = ptr[(ptr > 0) & (ptr < item_K.numel())]
    is_rising[inner - 1] = True  # from one row to the next anything goes
    if not is_rising.all():
        row = int(torch.searchsorted(ptr, (~is_rising).nonzero()[0], right=True)) - 1
        raise ValueError(f"exclude.item does not rise within row {row}; sort each row and drop repeated items")
