"""Dimension parallelism: each process owns some columns of the embedding table and of the optimizer's state.

Legend: N users and items, D embedding dim, d the columns of this process.

Propagation treats every column alone, so it needs no communication. A score is a sum over columns: the processes add up
their partial scores, and all compute the same loss from the sum. Its gradient by a partial score is that by the sum, so
backward needs no communication either, as long as nothing between the sum and the loss differs between processes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apps.graphrec.config import Config
from shared import distributed
from shared.distributed import Group


class Columns(NamedTuple):
    """Which columns of the whole table this process owns."""

    group: Group
    width: int  # of the whole table

    @property
    def own(self) -> slice:
        rank, world = self.group.rank, self.group.world
        return slice(self.width * rank // world, self.width * (rank + 1) // world)


def check_columns(config: Config, *, loss: str, precision: str, columns: Columns) -> None:
    """Refuse what dimension parallelism does not do."""
    training, world = config.training, columns.group.world
    faults = [
        (config.model.model not in ("mf", "lightgcn"), f"--model {config.model.model}: it is for mf and lightgcn"),
        (loss not in ("bpr", "softmax"), f"--loss {loss}: it is for bpr and softmax"),
        (training.clip_norm > 0, "--clip-norm: no process sees the whole gradient"),
        (precision == "fp16", "--precision fp16: no process sees every overflow"),
        (columns.width < world, f"{world} processes: there are {columns.width} columns (--embed-dim)"),
    ]
    for wrong, what in faults:
        if wrong:
            raise ValueError(f"--parallel dims does not go with {what}; use --parallel data, or change that")


class _Total(torch.autograd.Function):
    """Sums over the processes; all go on with the same values, so the gradients are those of the parts."""

    @staticmethod
    def forward(ctx: Any, columns: Columns, *parts: Tensor) -> tuple[Tensor, ...]:
        sums = tuple(part.clone() for part in parts)
        distributed.sum_(columns.group, sums)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *grads)


def total(columns: Columns, *parts: Tensor) -> tuple[Tensor, ...]:
    """The sum over the processes of each of the parts (of one dtype), in one exchange; differentiable as such."""
    sums: tuple[Tensor, ...] = _Total.apply(columns, *parts)  # type: ignore[no-untyped-call]
    return sums


def whole(columns: Columns, own_Nd: Tensor) -> Tensor:
    """The table [N, D] of which each process passes its own columns."""
    table_ND = own_Nd.new_zeros(own_Nd.shape[0], columns.width)
    table_ND[:, columns.own] = own_Nd.detach()
    distributed.sum_(columns.group, [table_ND])
    return table_ND


def whole_tree(columns: Columns, tree: Any) -> Any:
    """A checkpoint's tree with every matrix of own columns made whole; all processes call this at once."""
    return _mapped(tree, lambda own_Nd: whole(columns, own_Nd))


def own_tree(columns: Columns, tree: Any) -> Any:
    """The same tree with the own columns of every matrix."""
    return _mapped(tree, lambda table_ND: table_ND[:, columns.own].clone())


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree) if tree.dim() == 2 else tree
    if isinstance(tree, Mapping):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change) for value in tree)
    return tree
