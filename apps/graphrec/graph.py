"""The normalised graph of users and items, and how embeddings travel over it.

Legend: U users, I items, N = U + I nodes with the users first, P training pairs, D embedding dim, L layers.

A = [[0, R], [R^T, 0]], the entry of user u and item i being 1 / sqrt(d_u d_i) with the degrees d. A node without
interactions has an empty row: every layer but its own embedding is zero. LightGCN (He et al., SIGIR 2020) takes
Z = (E + A E + ... + A^L E) / (L + 1). A is symmetric and so is every polynomial of it, so the gradient of E is the same
polynomial applied to the gradient of Z: forward and backward are one function, and no layer is kept in between.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shared.ranking import Lists

Kernel = Literal["bag", "csr"]
Combine = Literal["mean", "last"]

ROW_BYTES = 128  # of a row that the kernel "bag" reads at a time on a CPU: narrow columns stay in the caches
NOISE_CHUNK = 1 << 18  # elements of noise made at a time, for the same reason
PROBE_TRIES = 3
_INT32_LIMIT = 2**31


class Graph(NamedTuple):
    """A in compressed rows; a user's neighbours are item nodes, an item's are users, both rising."""

    ptr: Tensor  # [N + 1] int32 (int64 from 2 ** 30 pairs on), starts at 0
    column: Tensor  # [2 P], the same dtype, neighbours: item i is node U + i
    weight: Tensor  # [2 P] float32, 1 / sqrt(d_u d_i)
    num_users: int

    @property
    def num_nodes(self) -> int:
        return self.ptr.numel() - 1


class Matrix(NamedTuple):
    """A sparse matrix in compressed rows."""

    ptr: Tensor
    column: Tensor
    weight: Tensor
    num_columns: int


def make_graph(train: Lists, *, num_items: int, device: torch.device) -> Graph:
    """The graph of training lists (per user: ptr [U + 1], item [P]) on `device`."""
    num_users = train.ptr.numel() - 1
    user_P = torch.repeat_interleave(torch.arange(num_users, device=train.ptr.device), train.ptr.diff())
    graph = _build(user_P, train.item.long(), num_users=num_users, num_items=num_items)
    return Graph(graph.ptr.to(device), graph.column.to(device), graph.weight.to(device), num_users)


def drop_edges(graph: Graph, rate: float, generator: torch.Generator) -> Graph:
    """The graph without a random share `rate` of its pairs, degrees counted anew (SGL, Wu et al., SIGIR 2021).

    A pair goes in both directions or in none, so the matrix stays symmetric.
    """
    num_pairs = graph.column.numel() // 2
    degree_U = graph.ptr[: graph.num_users + 1].diff()
    user_P = torch.repeat_interleave(torch.arange(graph.num_users, device=graph.ptr.device), degree_U)
    item_P = graph.column[:num_pairs].long() - graph.num_users
    keep_P = (torch.rand(num_pairs, generator=generator, device=generator.device) >= rate).to(graph.ptr.device)
    num_items = graph.num_nodes - graph.num_users
    return _build(user_P[keep_P], item_P[keep_P], num_users=graph.num_users, num_items=num_items)


def halves(graph: Graph) -> tuple[Matrix, Matrix]:
    """R ([U, I]) and its transpose: the two parts of A that are not zero, as views where that is possible."""
    num_users, num_pairs = graph.num_users, graph.column.numel() // 2
    users = Matrix(
        graph.ptr[: num_users + 1],
        graph.column[:num_pairs] - num_users,
        graph.weight[:num_pairs],
        graph.num_nodes - num_users,
    )
    items = Matrix(
        graph.ptr[num_users:] - num_pairs, graph.column[num_pairs:], graph.weight[num_pairs:], graph.num_users
    )
    return users, items


def multiply(graph: Graph, x_ND: Tensor, *, kernel: str = "auto") -> Tensor:
    """A x, without autograd."""
    return _powers(_matrix(graph), [None, x_ND], kernel=kernel)


def product(matrix: Matrix, x: Tensor, *, low_precision: bool = False, kernel: str = "auto") -> Tensor:
    """The sparse matrix times x, without autograd; `low_precision` as in `propagate`."""
    return _powers(matrix, [None, x], low_precision=low_precision, kernel=kernel)


def propagate(
    graph: Graph,
    x_ND: Tensor,
    *,
    layers: int,
    combine: str = "mean",
    low_precision: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """The mean of x, A x, ..., A^L x, or the last of them alone, [N, D] in the dtype of x; differentiable in x.

    Autocast has no effect here: products are float32, or with `low_precision` sums of rows and weights rounded to
    bfloat16, added up in float32 and rounded once per layer. The layers are added in the dtype of x either way.
    """
    assert combine in get_args(Combine), combine
    result: Tensor = _Propagation.apply(x_ND, graph, layers, combine, low_precision, kernel)  # type: ignore[no-untyped-call]
    return result


def propagate_noisy(
    graph: Graph,
    x_ND: Tensor,
    *,
    layers: int,
    eps: float,
    generator: torch.Generator,
    contrast_layer: int = 1,
    low_precision: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(mean of layers 1 .. L, output of `contrast_layer`), noise of length `eps` in every layer; differentiable in x.

    Layer k is h_k = A h_(k-1) + eps sign(A h_(k-1)) * r / |r| with r uniform and positive, drawn from `generator` for
    every node; layer 0 is left out of the mean. SimGCL (Yu et al., SIGIR 2022) contrasts two such means, XSimGCL (TKDE
    2024) the mean with the output of one layer. The noise is a constant for autograd.
    """
    if not 1 <= contrast_layer <= layers:
        raise ValueError(
            f"contrast_layer {contrast_layer} is none of the layers 1 to {layers} that get noise; "
            "raise layers or lower contrast_layer"
        )
    noise = (eps, generator)
    result: tuple[Tensor, Tensor] = _NoisyPropagation.apply(  # type: ignore[no-untyped-call]
        x_ND, graph, layers, noise, contrast_layer, low_precision, kernel
    )
    return result


def choose_kernel(graph: Graph, dim: int, device: torch.device) -> tuple[Kernel, str]:
    """The faster kernel for products with `dim` columns on `device`, and a sentence that says why.

    On CUDA both multiply the graph, which must be there, a few times (sync); the best time of each counts.
    """
    if device.type != "cuda":
        return "bag", "kernel bag: embedding_bag over compressed rows is torch's fastest sparse product on a CPU"
    x_ND = torch.ones(graph.num_nodes, dim, device=device)
    best_ms = {kernel: _probe(graph, x_ND, kernel) for kernel in get_args(Kernel)}
    winner: Kernel = min(best_ms, key=best_ms.__getitem__)
    times = ", ".join(f"{kernel} {ms:.3f} ms" for kernel, ms in best_ms.items())
    return winner, f"kernel {winner}: one product of the graph with {dim} columns took {times} (best of {PROBE_TRIES})"


def graph_bytes(*, num_users: int, num_items: int, num_pairs: int, dim: int = 0) -> int:
    """Bytes of the graph and, with `dim`, of what one float32 propagation allocates on a CPU: result and column blocks.

    The graph has 2 P entries of 4 bytes column and 4 bytes weight, and N + 1 row starts of 4 bytes. The result has N
    rows of 4 D bytes; three blocks of it, at most ROW_BYTES wide, exist at a time, on CUDA as wide as the result.
    """
    num_nodes = num_users + num_items
    id_bytes = 4 if 2 * num_pairs < _INT32_LIMIT else 8
    graph = 2 * num_pairs * (id_bytes + 4) + (num_nodes + 1) * id_bytes
    return graph + num_nodes * (4 * dim + 3 * min(4 * dim, ROW_BYTES))


class _Propagation(torch.autograd.Function):
    """A symmetric linear map: the gradient of its input is the map applied to that of its output."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, graph: Graph, layers: int, combine: str, low_precision: bool, kernel: str
    ) -> Tensor:
        ctx.settings = (graph, layers, combine, low_precision, kernel)
        lower = None if combine == "last" else x_ND
        divisor = 1 if combine == "last" else layers + 1
        terms = [*[lower] * layers, x_ND]
        return _powers(_matrix(graph), terms, divisor=divisor, low_precision=low_precision, kernel=kernel)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        # through apply, so that second derivatives exist too
        return (_Propagation.apply(grad_ND, *ctx.settings), *[None] * len(ctx.settings))  # type: ignore[no-untyped-call]


class _NoisyPropagation(torch.autograd.Function):
    """Layers with noise; the gradients of both outputs travel back over the clean graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        graph: Graph,
        layers: int,
        noise: tuple[float, torch.Generator],
        contrast_layer: int,
        low_precision: bool,
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.settings = (graph, layers, contrast_layer, low_precision, kernel)
        ctx.set_materialize_grads(False)  # the second output is often left unused
        layer_ND, total_ND, contrast_ND = x_ND, torch.zeros_like(x_ND), x_ND
        for layer in range(1, layers + 1):
            layer_ND = _powers(_matrix(graph), [None, layer_ND], low_precision=low_precision, kernel=kernel)
            _add_noise(layer_ND, *noise)
            total_ND += layer_ND
            if layer == contrast_layer:
                contrast_ND = layer_ND
        return total_ND.div_(layers), contrast_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean_ND: Tensor | None, grad_contrast_ND: Tensor | None) -> tuple[Tensor | None, ...]:
        graph, layers, contrast_layer, low_precision, kernel = ctx.settings
        terms: list[Tensor | None] = [None] * (layers + 1)  # the gradient of layer k's output travels k products
        if grad_mean_ND is not None:
            terms[1:] = [grad_mean_ND / layers] * layers
        if grad_contrast_ND is not None:
            below = terms[contrast_layer]
            terms[contrast_layer] = grad_contrast_ND if below is None else below + grad_contrast_ND
        while terms and terms[-1] is None:
            terms.pop()
        grad_ND = _powers(_matrix(graph), terms, low_precision=low_precision, kernel=kernel) if terms else None
        return grad_ND, None, None, None, None, None, None


def _build(user_P: Tensor, item_P: Tensor, *, num_users: int, num_items: int) -> Graph:
    """The graph of pairs that are ordered by user, then item."""
    degree_U = torch.bincount(user_P, minlength=num_users)
    degree_I = torch.bincount(item_P, minlength=num_items)
    assert len(degree_U) == num_users, "a user id is not below num_users"
    assert len(degree_I) == num_items, "an item id is not below num_items"
    weight_P = (degree_U[user_P] * degree_I[item_P]).double().rsqrt().float()
    by_item_P = torch.argsort(item_P, stable=True)
    id_dtype = torch.int32 if 2 * len(user_P) < _INT32_LIMIT else torch.int64  # the kernels want one for ptr and index
    degree_N = torch.cat([degree_U, degree_I])
    return Graph(
        torch.cat([degree_N.new_zeros(1), degree_N.cumsum(0)]).to(id_dtype),
        torch.cat([item_P + num_users, user_P[by_item_P]]).to(id_dtype),
        torch.cat([weight_P, weight_P[by_item_P]]),
        num_users,
    )


def _matrix(graph: Graph) -> Matrix:
    return Matrix(graph.ptr, graph.column, graph.weight, graph.num_nodes)


def _powers(
    matrix: Matrix,
    terms: Sequence[Tensor | None],
    *,
    kernel: str,
    divisor: int = 1,
    low_precision: bool = False,
) -> Tensor:
    """Sum of M^k terms[k], divided by `divisor`, by Horner's rule; the last term must be there.

    Columns do not meet in a product, so a block of them goes through all layers before the next one does.
    """
    top = terms[-1]
    assert top is not None
    if kernel == "auto":
        kernel = "csr" if top.device.type == "cuda" else "bag"
    rows_dtype = torch.bfloat16 if low_precision else top.dtype
    result = top.new_empty(matrix.ptr.numel() - 1 if len(terms) > 1 else len(top), top.shape[1])
    with torch.no_grad(), torch.autocast(top.device.type, enabled=False):
        matrix = matrix._replace(weight=matrix.weight.to(rows_dtype))
        for columns in _column_blocks(top, rows_dtype, kernel):
            block = top[:, columns]
            for term in reversed(terms[:-1]):
                block = _product(matrix, block.to(rows_dtype).contiguous(), kernel)
                if term is not None:
                    block = block.to(top.dtype).add_(term[:, columns])
            result[:, columns] = block if divisor == 1 else block / divisor
    return result


def _column_blocks(x: Tensor, rows_dtype: torch.dtype, kernel: str) -> Iterator[slice]:
    """Slices of columns that go through the layers together; all at once except in the CPU's bag kernel."""
    width = x.shape[1]
    step = ROW_BYTES // rows_dtype.itemsize if x.device.type == "cpu" and kernel == "bag" else max(1, width)
    return (slice(begin, begin + step) for begin in range(0, width, step))


def _product(matrix: Matrix, x: Tensor, kernel: str) -> Tensor:
    """The matrix times the contiguous x, of one dtype with its weights; half precision is added up in float32."""
    if kernel == "bag":
        return F.embedding_bag(
            matrix.column, x, matrix.ptr, mode="sum", per_sample_weights=matrix.weight, include_last_offset=True
        )
    assert kernel == "csr", kernel
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        raise ValueError("kernel csr has no bfloat16 rows on a CPU; use kernel bag, or leave out bf16_rows")
    size = (matrix.ptr.numel() - 1, matrix.num_columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        sparse = torch.sparse_csr_tensor(matrix.ptr, matrix.column, matrix.weight, size, check_invariants=False)
    return torch.mm(sparse, x)


def _add_noise(layer_ND: Tensor, eps: float, generator: torch.Generator) -> None:
    """Moves every row by a random vector of length eps in its own orthant, in place; zeros stay zero."""
    rows = max(1, NOISE_CHUNK // max(1, layer_ND.shape[1]))
    for part in torch.split(layer_ND, rows):
        direction = _positive_noise(part.shape, generator).to(part.device, part.dtype)
        direction *= eps / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        part.addcmul_(direction, part.sign())


def _positive_noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform draws from 0.5, 1.5, ..., 255.5: eight for each number of the generator, whose speed is the limit."""
    count = shape.numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:count].view(shape).float().add_(0.5)


def _probe(graph: Graph, x_ND: Tensor, kernel: Kernel) -> float:
    """Milliseconds of the fastest of a few products."""
    times_ms = []
    for _ in range(PROBE_TRIES + 1):  # the first loads the kernel
        torch.cuda.synchronize(x_ND.device)
        start = time.perf_counter()
        multiply(graph, x_ND, kernel=kernel)
        torch.cuda.synchronize(x_ND.device)
        times_ms.append(1000 * (time.perf_counter() - start))
    return min(times_ms[1:])
