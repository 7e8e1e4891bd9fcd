"""Frozen tensors of images of people, and batches made from them by index arithmetic.

Legend: N images, P identities, S samples, B samples of a batch, R images of a batch, C captions, L tokens of a caption,
H height, W width, G images of a gallery, Q queries, K modalities of a query, V views.

A sample is an RGB image of somebody to train on, with its own caption and one image drawn from each other modality of
the same person. Which ones are drawn depends on (seed, epoch, sample) alone, never on the batch or the worker. Colour
pencil and sketch of a sample show the same view where the data allow it.
"""

import hashlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from apps.reid.images import load_image
from shared.files import read_safetensors
from shared.seed import fold

MODALITIES = ("rgb", "nir", "cp", "sk", "text")
IMAGE_MODALITIES = MODALITIES[:4]
RGB, NIR, CP, SK, TEXT = range(5)
VIEWS = ("front", "back", "side")

Stage = Literal["valid", "test"]
STAGES: tuple[Stage, ...] = ("valid", "test")

_Packed: TypeAlias = tuple[bytes, torch.dtype, tuple[int, ...]]  # a tensor's compressed bytes, its type and its shape

_RULE_SEED = 0  # of the draws for lists by rule: the same lists in every run
_DRAW_STREAM = 21  # and the four after it: nir, cp, sk, text, view
_VIEW_SLOTS = 1 + len(VIEWS)  # unknown first
_SLOTS = len(IMAGE_MODALITIES) * _VIEW_SLOTS  # of an identity
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the constants of splitmix64 as signed numbers
_FACTOR_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_FACTOR_2 = 0x94D049BB133111EB - (1 << 64)


def _query_lists() -> dict[str, tuple[int, ...]]:
    """The benchmark's 32 lists: every choice of modalities beside RGB, with each of them as the first one."""
    found = {}
    for count in range(1, 5):
        for chosen in itertools.combinations((NIR, CP, SK, TEXT), count):
            for main in chosen:
                order = (main, *(other for other in chosen if other != main))
                found["+".join(MODALITIES[modality].upper() for modality in order)] = order
    return found


QUERY_LISTS = _query_lists()  # "SK+NIR" -> (SK, NIR); the mode of a list is how many modalities it has


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Frame(NamedTuple):
    """The size that images are seen in, and the margin on each side from which crops may take."""

    height: int
    width: int
    rows: int  # of margin above, and as many below
    columns: int  # of margin at the left, and as many at the right

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width with the margin."""
        return self.height + 2 * self.rows, self.width + 2 * self.columns


@dataclass(frozen=True)
class Texts:
    """Many texts as two tensors."""

    data: Tensor  # uint8, UTF-8 of all of them
    ptr: Tensor  # [len + 1] int64, text i is data[ptr[i]:ptr[i + 1]]

    def __len__(self) -> int:
        return self.ptr.numel() - 1

    def __getitem__(self, place: int) -> str:
        start, end = self.ptr[place : place + 2].tolist()
        return bytes(self.data[start:end].tolist()).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        data = bytearray(self.data.numel())
        if data:
            torch.frombuffer(data, dtype=torch.uint8).copy_(self.data)
        for start, end in itertools.pairwise(self.ptr.tolist()):
            yield data[start:end].decode("utf-8", "surrogateescape")

    def __reduce__(self) -> tuple[Any, ...]:
        return _texts_again, (_packed(self.data), _packed(self.ptr.to(torch.int32)))


def make_texts(texts: Sequence[str]) -> Texts:
    """The texts as tensors."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    ptr = torch.zeros(len(encoded) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor([len(text) for text in encoded], dtype=torch.int64), 0, out=ptr[1:])
    data = bytearray(b"".join(encoded))
    return Texts(torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8), ptr)


@dataclass(frozen=True)
class PackedImages:
    """All images in one memory-mapped tensor; pickled, it is the path of its file."""

    file: Path
    frame: Frame
    image: Tensor  # [N, 3, H, W] uint8 of size `frame.stored`

    def load(self, rows: Tensor) -> Tensor:
        """The images of these rows ([R] int64), [R, 3, H, W] uint8 with their margin."""
        return self.image.index_select(0, rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_images, (self.file, self.frame)


def open_images(file: Path, frame: Frame) -> PackedImages:
    """The images of a pack, mapped; raises DamagedFileError."""
    tensors, _ = read_safetensors(file)
    return PackedImages(file, frame, tensors["image"])


@dataclass(frozen=True)
class ImageFiles:
    """Images that are decoded whenever they are asked for: the reference, and for data larger than the disk."""

    root: Path
    frame: Frame
    path: Texts  # from `root`

    def load(self, rows: Tensor) -> Tensor:
        """The images of these rows ([R] int64), [R, 3, H, W] uint8 with their margin; raises ImageError."""
        height, width = self.frame.stored
        image_RCHW = torch.empty(rows.numel(), 3, height, width, dtype=torch.uint8)
        for place, row in enumerate(rows.tolist()):
            image_RCHW[place] = load_image(self.root / self.path[row], height, width)
        return image_RCHW


Images: TypeAlias = PackedImages | ImageFiles


class Queries(NamedTuple):
    """One list of queries."""

    modalities: tuple[int, ...]  # K of MODALITIES, the main one first
    item: Tensor  # [Q, K] int64: rows of images; where the modality is text, places of captions
    identity: Tensor  # [Q] int64; some may have nobody in the gallery, and are then left out of every mean


@dataclass(frozen=True)
class Retrieval:
    """What is searched for, and where."""

    gallery: Tensor  # [G] int64, rows of RGB images
    queries: dict[str, Queries]  # by name, as "NIR+SK"
    camera_rule: bool  # whether gallery images of the query's own person and camera do not count
    rule: str  # how the lists came about, a phrase for protocol texts


@dataclass(frozen=True)
class People:
    """Images of people with what is known of them; nothing in it changes after construction.

    Identities are numbered with those to train on first, then those to validate on, then those to test on: nobody is in
    two of these parts.
    """

    identity: Tensor  # [N] int64, 0..P-1
    camera: Tensor  # [N] int64, -1 where it is not known
    modality: Tensor  # [N] int64, of IMAGE_MODALITIES
    view: Tensor  # [N] int64, of VIEWS; -1 where it is not known
    caption: Tensor  # [N] int64, place among `captions`; -1 where there is none, as of all but RGB images
    captions: Texts
    path: Texts  # of the images, as the source calls them
    images: Images
    identity_ids: tuple[str, ...]  # raw id of identity p at [p]
    num_identities: int  # to train on: labels are below it
    num_valid: int  # identities to validate on
    valid: Retrieval | None  # None without identities to validate on
    test: Retrieval | None  # None where the source has no test part
    fingerprint: str  # of names, sizes and times of the source's images, of its lists, and of the split
    name: str  # what to call this data in messages
    split: str  # how it was divided, a phrase for protocol texts

    @property
    def num_images(self) -> int:
        return self.identity.numel()

    @cached_property
    def identity_digest(self) -> str:
        """Who is trained on and how they are numbered, 32 hex digits: a classifier's weights fit no other numbering."""
        text = "\n".join(self.identity_ids[: self.num_identities])
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Draws


class Groups(NamedTuple):
    """Images by identity, modality and view."""

    member: Tensor  # int64, rows of images
    ptr: Tensor  # [P * 16 + 1] int64


def group_images(people: People, is_member_N: Tensor) -> Groups:
    """The images that are asked for ([N] bool), grouped; those of a group keep their order."""
    row = is_member_N.nonzero().squeeze(1)
    slot = people.modality[row] * _VIEW_SLOTS + people.view[row] + 1
    key, order = (people.identity[row] * _SLOTS + slot).sort(stable=True)
    ptr = torch.searchsorted(key, torch.arange(len(people.identity_ids) * _SLOTS + 1))
    return Groups(row[order], ptr)


def hash_numbers(number_B: Tensor, *ids: int) -> Tensor:
    """Well-mixed numbers in 0 .. 2**63 - 1 that depend on each number and on the ids, [B] int64."""
    state = fold(*ids) + number_B * _GOLDEN  # wraps around, as splitmix64 does
    state = (state ^ (state >> 30 & (1 << 34) - 1)) * _FACTOR_1
    state = (state ^ (state >> 27 & (1 << 37) - 1)) * _FACTOR_2
    return (state ^ (state >> 31 & (1 << 33) - 1)) & (1 << 63) - 1


def draw_images(
    groups: Groups, identity_B: Tensor, number_B: Tensor, *, seed: int, epoch: int, view_B: Tensor | None = None
) -> Tensor:
    """One image per modality beside RGB of each identity, [B, 3] int64 rows; -1 where there is none.

    The draws depend on seed, epoch and the sample's number. `view_B` is the view that colour pencil and sketch shall
    show; where it is absent or -1, it is drawn from the views that both have, or else that one of them has. A modality
    without an image of the view takes any of its images.
    """
    ptr = groups.ptr
    base_B = identity_B * _SLOTS

    def numbers(stream: int) -> Tensor:
        return hash_numbers(number_B, seed, epoch, _DRAW_STREAM + stream)

    slot_2V = torch.tensor([[modality * _VIEW_SLOTS + 1 + view for view in range(len(VIEWS))] for modality in (CP, SK)])
    slot_B2V = base_B[:, None, None] + slot_2V
    has_B2V = ptr[slot_B2V + 1] > ptr[slot_B2V]
    both_BV = has_B2V.all(1)
    choice_BV = torch.where(both_BV.any(1, keepdim=True), both_BV, has_B2V.any(1))
    place_B = numbers(4) % choice_BV.sum(1).clamp(min=1)
    drawn_B = (choice_BV & (choice_BV.cumsum(1) == place_B[:, None] + 1)).int().argmax(1)
    wanted_B = drawn_B if view_B is None else torch.where(view_B >= 0, view_B, drawn_B)

    columns = []
    for modality in (NIR, CP, SK):
        slot_B = base_B + modality * _VIEW_SLOTS
        start_B, end_B = ptr[slot_B], ptr[slot_B + _VIEW_SLOTS]
        if modality != NIR:
            slot_B = slot_B + 1 + wanted_B
            has_B = ptr[slot_B + 1] > ptr[slot_B]
            start_B, end_B = torch.where(has_B, ptr[slot_B], start_B), torch.where(has_B, ptr[slot_B + 1], end_B)
        columns.append(_choice(groups.member, start_B, end_B, numbers(modality - 1)))
    return torch.stack(columns, dim=1)


def _choice(member: Tensor, start_B: Tensor, end_B: Tensor, number_B: Tensor) -> Tensor:
    """The member of each range that the number falls on; -1 for an empty range."""
    count_B = end_B - start_B
    if not member.numel():
        return torch.full_like(start_B, -1)
    place_B = (start_B + number_B % count_B.clamp(min=1)).clamp(max=member.numel() - 1)
    return torch.where(count_B > 0, member[place_B], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """Samples with all their images, one modality after another."""

    image: Tensor  # [R, 3, H, W] uint8, one row per image that is present, with the margin that crops take from
    modality: Tensor  # [R] int64, of IMAGE_MODALITIES
    slot: Tensor  # [R] int64, which of the B samples the image belongs to
    present: Tensor  # [B, 5] bool, which of MODALITIES each sample has
    token: Tensor  # [B, L] int64 caption tokens, zeros where there is none
    label: Tensor  # [B] int64, identity 0..num_identities-1
    camera: Tensor  # [B] int64 of the RGB image, -1 where it is not known


@dataclass(frozen=True)
class Samples:
    """What is trained on: `samples[epoch, places]` is a Batch, here or in a worker process.

    It is small when it is pickled, for workers that are started afresh get a copy each.
    """

    row: Tensor  # [S] int64, RGB images
    label: Tensor  # [S] int64
    camera: Tensor  # [S] int64
    token: Tensor  # [S, L] caption tokens in any integer type, zeros where there is none
    present: Tensor  # [S, 5] bool, which of MODALITIES the sample has
    groups: Groups
    images: Images
    seed: int

    def __len__(self) -> int:
        return self.row.numel()

    def __getitem__(self, key: tuple[int, Sequence[int] | Tensor]) -> Batch:
        epoch, places = key
        return make_batch(self, torch.as_tensor(places, dtype=torch.int64), epoch=epoch)

    def __reduce__(self) -> tuple[Any, ...]:
        rows = (self.row, self.label, self.camera)
        small = tuple(_packed(tensor.to(torch.int32)) for tensor in (*rows, *self.groups))
        return _samples_again, (small, _packed(self.token), _packed(self.present), self.images, self.seed)


def make_samples(people: People, token_CL: Tensor, *, seed: int) -> Samples:
    """The samples of the identities to train on, in the order of their RGB images; `token_CL` are all captions' tokens.

    token_CL: one row per caption of `people.captions`, in any integer type, padded with zeros.
    """
    if len(token_CL) != len(people.captions):
        raise ValueError(f"{len(token_CL)} rows of tokens for {len(people.captions)} captions; tokenise all of them")
    trains_N = people.identity < people.num_identities
    row = (trains_N & (people.modality == RGB)).nonzero().squeeze(1)
    label = people.identity[row]
    groups = group_images(people, trains_N)
    first = label[:, None] * _SLOTS + torch.arange(len(IMAGE_MODALITIES)) * _VIEW_SLOTS
    caption = people.caption[row]
    has_text = caption >= 0
    token = token_CL.new_zeros(row.numel(), token_CL.shape[1])
    token[has_text] = token_CL[caption[has_text]]
    present = torch.cat([groups.ptr[first + _VIEW_SLOTS] > groups.ptr[first], has_text[:, None]], dim=1)
    return Samples(row, label, people.camera[row], token, present, groups, people.images, seed)


def draw_rows(samples: Samples, place_B: Tensor, *, epoch: int) -> Tensor:
    """The images of these samples in this epoch, [B, 4] int64 by IMAGE_MODALITIES; -1 where there is none."""
    others_B3 = draw_images(samples.groups, samples.label[place_B], place_B, seed=samples.seed, epoch=epoch)
    return torch.cat([samples.row[place_B, None], others_B3], dim=1)


def make_batch(samples: Samples, place_B: Tensor, *, epoch: int, keep_B5: Tensor | None = None) -> Batch:
    """The batch of these samples, images included, without modalities where `keep_B5` ([B, 5] bool) is False."""
    row_B4, present_B5 = draw_rows(samples, place_B, epoch=epoch), samples.present[place_B]
    token_BL = samples.token[place_B].long()
    if keep_B5 is not None:
        row_B4 = torch.where(keep_B5[:, :-1], row_B4, -1)  # what is left out is not even loaded
        present_B5, token_BL = present_B5 & keep_B5, token_BL * keep_B5[:, -1:]
    modality_R, slot_R = (row_B4.t() >= 0).nonzero().unbind(1)
    return Batch(
        image=samples.images.load(row_B4[slot_R, modality_R]),
        modality=modality_R,
        slot=slot_R,
        present=present_B5,
        token=token_BL,
        label=samples.label[place_B],
        camera=samples.camera[place_B],
    )


def _packed(tensor: Tensor) -> _Packed:
    data = bytearray(tensor.numel() * tensor.element_size())
    if data:
        torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
    return zlib.compress(data, 1), tensor.dtype, tuple(tensor.shape)


def _unpacked(packed: _Packed) -> Tensor:
    data, dtype, shape = packed
    raw = bytearray(zlib.decompress(data))
    return (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).view(shape)


def _texts_again(data: _Packed, ptr: _Packed) -> Texts:
    return Texts(_unpacked(data), _unpacked(ptr).long())


def _samples_again(small: Sequence[_Packed], token: _Packed, present: _Packed, images: Images, seed: int) -> Samples:
    row, label, camera, member, ptr = (_unpacked(packed).long() for packed in small)
    return Samples(row, label, camera, _unpacked(token), _unpacked(present), Groups(member, ptr), images, seed)


# ---------------------------------------------------------------------------------------------------------------------
# Lists by rule


def lists_by_rule(people: People, first: int, last: int) -> Retrieval:
    """Gallery and queries of the identities first..last-1, for parts without official lists.

    With another modality than RGB: the gallery is all RGB images; a list has one query per image or caption of its main
    modality whose person has the others too, and one of each other is drawn for it (colour pencil and sketch of the
    same view where possible). With RGB alone: each person's first image of each camera is a query, or of all cameras
    where there is one camera only, and the gallery is the rest.
    """
    within_N = (people.identity >= first) & (people.identity < last)
    rgb = (within_N & (people.modality == RGB)).nonzero().squeeze(1)
    has_text = people.caption[rgb] >= 0
    if bool((within_N & (people.modality != RGB)).any()) or bool(has_text.any()):
        return Retrieval(rgb, _mixed_queries(people, within_N, rgb[has_text]), False, _MIXED_RULE)
    camera = people.camera[rgb]
    has_cameras = camera.numel() > 0 and int(camera.min()) < int(camera.max())
    key = people.identity[rgb] * (int(camera.max()) + 2) + camera + 1 if has_cameras else people.identity[rgb]
    key, order = key.sort(stable=True)
    is_query = torch.ones_like(key, dtype=torch.bool)
    is_query[1:] = key[1:] != key[:-1]
    query, gallery = rgb[order[is_query]].sort().values, rgb[order[~is_query]].sort().values
    queries = {"RGB": Queries((RGB,), query[:, None], people.identity[query])}
    return Retrieval(gallery, queries, has_cameras, _RGB_RULE)


_MIXED_RULE = (
    "gallery: all RGB images of these identities; queries: every image or caption of a list's main modality, the other "
    "modalities drawn per query"
)
_RGB_RULE = "queries: the first image of each identity and camera; gallery: the rest"


def _mixed_queries(people: People, within_N: Tensor, described: Tensor) -> dict[str, Queries]:
    """The lists that these images and the captions of `described` (rows of RGB images) allow."""
    groups = group_images(people, within_N & (people.modality != RGB))
    owner, order = people.identity[described].sort(stable=True)
    caption = people.caption[described[order]]
    queries = {}
    for name, modalities in QUERY_LISTS.items():
        main = modalities[0]
        is_sketched = main in (CP, SK)
        row = described if main == TEXT else (within_N & (people.modality == main)).nonzero().squeeze(1)
        identity = people.identity[row]
        view = people.view[row] if is_sketched else None
        drawn_Q3 = draw_images(groups, identity, row, seed=_RULE_SEED, epoch=0, view_B=view)
        start, end = torch.searchsorted(owner, identity), torch.searchsorted(owner, identity, right=True)
        text_Q1 = _choice(caption, start, end, hash_numbers(row, _RULE_SEED, 0, _DRAW_STREAM + 3))[:, None]
        item_QK = torch.cat([drawn_Q3, text_Q1], dim=1)[:, [modality - 1 for modality in modalities]]
        item_QK[:, 0] = people.caption[row] if main == TEXT else row
        is_whole = (item_QK >= 0).all(1)
        if bool(is_whole.any()):
            queries[name] = Queries(modalities, item_QK[is_whole], identity[is_whole])
    return queries
