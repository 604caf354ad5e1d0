"""All pairs of rows whose cosine similarity reaches a floor: within cells, exactly, or among the links of a graph.

Comparing n rows of d components takes n^2 d / 2 multiplications, nearly all of them for pairs that are far apart. Two
steps leave little of it, and neither can lose a pair:

- each row is turned onto the main axes of a sample and cut to its first components, and the length of the rest is put
  beside them: by Cauchy and Schwarz the product of two such short rows is never below the similarity of the whole rows;
- short rows are multiplied in bfloat16 where the processor has it, and a pair stays as long as its product is nearer to
  the floor than all roundings together.

What remains is multiplied again as it was given, in float64: the similarity of a pair does not depend on what it was
compared together with, nor on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

from penstock.operators.indexing import faiss_threads

if TYPE_CHECKING:
    import torch

_faiss: Any = faiss  # the type stubs of faiss 1.15 leave names out

# Below it short rows tell few pairs apart, and most rows are near some other cell.
LEAST_EXACT_SIMILARITY = 0.8
SAMPLE_ROWS = 2_048
SAMPLE_SEED = 20_260_501
# Components of a short row, multiples of what matrix units multiply at once.
SHORT_COMPONENTS = (16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512)
# Looking at a pair again takes as long as this many multiplications of the filter: 0.5 us against 5 ps.
PAIR_COST = 100_000
# bfloat16 keeps 8 bits: both factors of a sum of at most 1 are rounded by at most 2^-8 of them. The result is rounded
# too, but so is what it is compared with, which keeps their order.
ROUNDING = 2.0**-8
FILTER_MARGIN = {"bfloat16": 2 * ROUNDING + ROUNDING**2 + 1e-4, "float32": 1e-4}
# Looking through 8,192 x 256 products takes 32 ps each, through 4,096 x 128 up to 75.
BLOCK_ROWS = 256
CHUNK_ROWS = 8_192
# oneDNN compiles a kernel for each new shape, which takes longer than to multiply: shapes are padded to few.
STEP_ROWS = 512
FOLDED_ROWS = 64
# More than a squared length is off that is added up in float32.
LENGTH_MARGIN = 4e-6
GPU_ROWS = 16_384  # of blocks and chunks: 512 MiB of products
# Products that reach the threshold are named so many and one row at a time: all of two blocks of near copies would be
# 8 GiB of places.
MOST_REACHING = 1 << 22
CANDIDATES = 1 << 16
PAIR_ROWS = 1_024  # pairs looked at again at once: 3 MiB of rows of 384 components
GRAPH_LINKS = 32
GRAPH_EF_CONSTRUCTION = 100

_Places = tuple[np.ndarray, np.ndarray]


class Join(StrEnum):
    """How pairs are looked for: everywhere, among the links of a graph, or in the cell of a row alone (SemDeDup)."""

    EXACT = "exact"
    GRAPH = "graph"
    CLUSTER = "cluster"


@dataclass(frozen=True, eq=False)
class Pairs:
    """Similar rows by number.

    Attributes:
        left, right: int64 (e,), left below right; no pair comes twice.
        similarity: float32 (e,), their cosine similarity, added up in float64.
    """

    left: np.ndarray
    right: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.left)

    @staticmethod
    def joined(parts: list[Pairs]) -> Pairs:
        """All of some pairs, sorted by left and right."""
        if not parts:
            return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        left, right = (np.concatenate([getattr(part, name) for part in parts]) for name in ("left", "right"))
        similarity = np.concatenate([part.similarity for part in parts])
        order = np.lexsort((right, left))
        return Pairs(left[order], right[order], similarity[order])

    def where(self, chosen: np.ndarray) -> Pairs:
        """Those that a bool array (e,) chooses."""
        return Pairs(self.left[chosen], self.right[chosen], self.similarity[chosen])


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Floating point (n, d) as float32 rows of unit length.

    Raises:
        ValueError: naming the first row that is zero or not finite: it has no direction to compare.
    """
    rows = np.array(vectors, np.float32)
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    fit = np.isfinite(lengths) & (lengths > 0)
    if not fit.all():
        row = int(np.argmin(fit))
        raise ValueError(
            f"vector {row} (length {lengths[row]}) must be finite and not zero, or it is similar to nothing; "
            "drop the row before duplicates are looked for"
        )
    rows /= lengths[:, None].astype(np.float32)
    return rows


def refuse_similarity(similarity: float, join: Join) -> None:
    """Refuses a least similarity that a join cannot work with.

    Raises:
        ValueError: outside (0, 1], or too low for the exact join.
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity ({similarity}) must be above 0 and at most 1, the cosine of equal vectors")
    if join is Join.EXACT and similarity < LEAST_EXACT_SIMILARITY:
        raise ValueError(
            f"similarity ({similarity}) must be at least {LEAST_EXACT_SIMILARITY} for join {join}: below it nearly "
            f"every row would have to be compared with every other; take join {Join.GRAPH} or {Join.CLUSTER}"
        )


def similar_pairs(vectors: np.ndarray, floor: float, first: int = 0, device: str = "cpu") -> Iterator[Pairs]:
    """Every pair of rows with a cosine similarity of at least `floor`, in parts.

    Memory: short rows in float32 and in the filter's type, which together take less than the vectors; pairs as they
    come.

    Args:
        vectors: float32 (n, d) of unit length (unit_rows).
        first: rows below it are not compared with one another: they were before, or are elsewhere.
        device: where to multiply short rows, as torch names it.

    Raises:
        ValueError: a floor outside [LEAST_EXACT_SIMILARITY, 1].
    """
    refuse_similarity(floor, Join.EXACT)
    rows = len(vectors)
    blocks = _blocks([(0, first, rows)], device)
    yield from _pairs(vectors, floor, np.arange(rows), blocks, device)


def cell_pairs(
    vectors: np.ndarray, cells: np.ndarray, floor: float, device: str = "cpu", first: int = 0
) -> Iterator[Pairs]:
    """Every pair of rows of one cell with a similarity of at least `floor`, in parts: the join of SemDeDup (Abbas et
    al., arXiv:2303.09540), which misses the pairs that a border between cells separates.

    Cells may be of any size: rows are compared with the earlier ones of their cell block by block.

    Args:
        vectors: float32 (n, d) of unit length.
        cells: integers (n,).
        first: rows below it are not compared with one another.

    Raises:
        ValueError: a floor outside (0, 1].
    """
    refuse_similarity(floor, Join.CLUSTER)
    order = np.argsort(cells, kind="stable")
    changes = np.flatnonzero(np.diff(cells[order])) + 1
    bounds = [0, *changes.tolist(), len(order)]
    below = np.concatenate([[0], np.cumsum(order < first)])  # of a cell they come first
    ranges = [(a, a + int(below[b] - below[a]), b) for a, b in zip(bounds, bounds[1:], strict=False)]
    yield from _pairs(vectors, floor, order, _blocks(ranges, device), device)


def graph_pairs(vectors: np.ndarray, floor: float, first: int = 0, links: int = GRAPH_LINKS) -> Iterator[Pairs]:
    """The pairs with a similarity of at least `floor` among the `links` nearest rows that an HNSW graph finds for each.

    Misses pairs of rows that have more twins than links, and what the graph does not find: measure the share found.
    Rows below `first` are not compared with one another. Memory: the vectors again, and 32 bytes for each row and link.

    Raises:
        ValueError: a floor outside (0, 1].
    """
    refuse_similarity(floor, Join.GRAPH)
    rows = len(vectors)
    if rows - first < 1 or rows < 2:
        return
    graph = _faiss.IndexHNSWFlat(vectors.shape[1], GRAPH_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = GRAPH_EF_CONSTRUCTION
    with faiss_threads(1):
        graph.add(vectors)
        graph.hnsw.efSearch = 2 * links
        _, found = graph.search(vectors[first:], min(links + 1, rows))
    row, other = np.repeat(np.arange(first, rows), found.shape[1]), found.reshape(-1)
    real = (other >= 0) & (other != row)
    once = np.unique(np.minimum(row, other)[real] * rows + np.maximum(row, other)[real])
    yield from _checked(vectors, floor, iter([(once // rows, once % rows)]))


def pair_similarities(vectors: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine similarities float32 (e,) of pairs of rows of float32 (n, d), added up in float64; 1 for equal rows."""
    result = np.empty(len(left), np.float32)
    for part in _chunks(len(left)):
        one, other = vectors[left[part]].astype(np.float64), vectors[right[part]].astype(np.float64)
        lengths = np.sqrt(np.einsum("ij,ij->i", one, one)) * np.sqrt(np.einsum("ij,ij->i", other, other))
        result[part] = np.einsum("ij,ij->i", one, other) / lengths
    return result


# ---- short rows


def _short_rows(vectors: np.ndarray, floor: float) -> np.ndarray:
    """Rows float32 (n, m) of unit length whose products are at least those of the vectors, within 1e-5."""
    picked = np.random.default_rng(SAMPLE_SEED).choice(len(vectors), min(SAMPLE_ROWS, len(vectors)), replace=False)
    sample = vectors[np.sort(picked)]
    axes = np.linalg.eigh(sample.T.astype(np.float64) @ sample)[1][:, ::-1].astype(np.float32)
    kept = _components(sample @ axes, floor)
    return vectors if kept == vectors.shape[1] else _shortened(vectors, axes[:, : kept - 1])


def _shortened(vectors: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """The components of unit rows along some axes at right angles, and at least the length of what these leave out."""
    short = np.empty((len(vectors), axes.shape[1] + 1), np.float32)
    np.matmul(vectors, axes, out=short[:, :-1])
    rest = 1 - np.einsum("ij,ij->i", short[:, :-1], short[:, :-1])
    short[:, -1] = np.sqrt(np.maximum(rest, 0) + LENGTH_MARGIN)
    return short


def _components(turned: np.ndarray, floor: float) -> int:
    """How many components make the filter cheapest, judged by the pairs of a sample that each choice lets through."""
    rows, dimension = turned.shape
    threshold = floor - FILTER_MARGIN[_filter_type("cpu")]
    best, least = int(dimension), math.inf
    for count in [*(count for count in SHORT_COMPONENTS if count < dimension), int(dimension)]:
        if count >= least:
            break
        short = turned if count == dimension else _shortened(turned, np.eye(dimension, count - 1, dtype=np.float32))
        through = max(0, int(np.count_nonzero(short @ short.T >= threshold)) - rows)
        cost = count + through / max(1, rows * (rows - 1)) * PAIR_COST
        if cost < least:
            best, least = count, cost
    return best


# ---- the filter


def _pairs(
    vectors: np.ndarray, floor: float, order: np.ndarray, blocks: list[tuple[int, int, int]], device: str
) -> Iterator[Pairs]:
    """The pairs of the blocks (start, first, end): places first..end of `order` with each other and those before, from
    `start` on."""
    if not blocks:
        return
    short = _Filter(_short_rows(vectors, floor)[order], floor, device)
    candidates = (places for block in blocks for places in short.candidates(*block))
    yield from _checked(vectors, floor, _by_row(candidates, order))


def _blocks(ranges: list[tuple[int, int, int]], device: str) -> list[tuple[int, int, int]]:
    """Ranges (start, first, end) cut into blocks; those without a pair are left out."""
    size = BLOCK_ROWS if device == "cpu" else GPU_ROWS
    return [
        (start, block, min(block + size, end))
        for start, first, end in ranges
        for block in range(first, end, size)
        if end - start > 1
    ]


class _Filter:
    """Multiplies short rows block by block, and names the pairs of places that may reach the floor."""

    def __init__(self, short: np.ndarray, floor: float, device: str) -> None:
        import torch

        name = _filter_type(device)
        if device != "cpu":  # sums in float32 throughout, as FILTER_MARGIN has it
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._block, self._chunk = (BLOCK_ROWS, CHUNK_ROWS) if device == "cpu" else (GPU_ROWS, GPU_ROWS)
        self._step = STEP_ROWS if device == "cpu" else GPU_ROWS
        rows, kind = torch.from_numpy(short), getattr(torch, name)
        shape = len(rows) + max(self._block, self._step), rows.shape[1]
        self._rows = torch.zeros(shape, dtype=kind, device=device)
        self._rows[: len(rows)] = rows
        off = _rounded_off(rows, kind)
        margin = min(FILTER_MARGIN[name], 2 * off + off**2 + FILTER_MARGIN["float32"])
        self._threshold = float(torch.tensor(floor - margin).to(kind))

    def candidates(self, start: int, first: int, end: int) -> Iterator[_Places]:
        """Places (left, right), left before right: right in first..end, left from `start` on."""
        import torch

        block = self._rows[first : first + self._block]
        for offset in range(start, first, self._chunk):
            stop = min(offset + self._chunk, first)
            padded = -(-(stop - offset) // self._step) * self._step
            for row, column in _reaching(torch.mm(self._rows[offset : offset + padded], block.T), self._threshold):
                real = (row < stop - offset) & (column < end - first)
                yield row[real] + offset, column[real] + first
        for row, column in _reaching(torch.triu(torch.mm(block, block.T), 1), self._threshold):
            real = (row < column) & (column < end - first)
            yield row[real] + first, column[real] + first


def _rounded_off(rows: torch.Tensor, kind: torch.dtype) -> float:
    """The most that rows float32 (n, m) move when they are rounded: a product of two unit rows changes by at most twice
    as much and its square, by Cauchy and Schwarz."""
    import torch

    parts = (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS))
    return max(float(torch.linalg.vector_norm(part - part.to(kind), dim=1).max()) for part in parts)


def _reaching(products: torch.Tensor, threshold: float) -> Iterator[_Places]:
    """Where products (r, c) reach a threshold, in parts of at most MOST_REACHING + c places, or of r * c on the CPU."""
    import torch

    if products.device.type == "cpu" and products.dtype is torch.bfloat16 and threshold > 0:
        # Positive floating point numbers are in the order of their bits, which are faster to compare.
        least = int(torch.tensor(threshold).to(torch.bfloat16).view(torch.int16))
        yield from _reaching_bits(products.view(torch.int16), least)
    elif bool(products.max() >= threshold):
        yield from _named(products >= threshold)


def _named(reaching: torch.Tensor) -> Iterator[_Places]:
    """The places of bool (r, c) that are true, of some whole rows at a time."""
    import torch

    upto = torch.cumsum(reaching.sum(1), 0).cpu().numpy()
    starts = np.flatnonzero(np.diff((upto - 1) // MOST_REACHING, prepend=-2))
    for first, last in zip(starts, [*starts[1:], len(upto)], strict=True):
        rows, columns = torch.nonzero(reaching[first:last], as_tuple=True)
        if len(rows):
            yield rows.cpu().numpy() + first, columns.cpu().numpy()


def _reaching_bits(bits: torch.Tensor, least: int) -> Iterator[_Places]:
    """Where int16 (r, c), r a multiple of FOLDED_ROWS, reach a value: first where the largest of a column in so many
    rows does, which takes a third of the time of comparing them all."""
    folded = bits.view(-1, FOLDED_ROWS, bits.shape[1])
    some = np.flatnonzero(folded.amax(1).numpy() >= least)
    if len(some) == 0:
        return
    fold, column = np.divmod(some, bits.shape[1])
    place, row = np.divmod(np.flatnonzero(folded.numpy()[fold, :, column] >= least), FOLDED_ROWS)
    yield fold[place] * FOLDED_ROWS + row, column[place]


def _filter_type(device: str) -> str:
    """bfloat16 where it is multiplied in hardware, with sums in float32."""
    import torch

    return "bfloat16" if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


# ---- the check


def _by_row(candidates: Iterator[_Places], order: np.ndarray) -> Iterator[_Places]:
    for left, right in candidates:
        one, other = order[left], order[right]
        yield np.minimum(one, other), np.maximum(one, other)


def _checked(vectors: np.ndarray, floor: float, candidates: Iterator[_Places]) -> Iterator[Pairs]:
    """The candidates that reach the floor, from CANDIDATES or more at a time."""
    waiting: list[_Places] = []
    count = 0
    for part in candidates:
        waiting.append(part)
        count += len(part[0])
        if count >= CANDIDATES:
            yield _reached(vectors, floor, waiting)
            waiting, count = [], 0
    if count:
        yield _reached(vectors, floor, waiting)


def _reached(vectors: np.ndarray, floor: float, candidates: list[_Places]) -> Pairs:
    """The candidates that reach the floor: a look in float32 for most, in float64 for those that are near or above."""
    left, right = (np.concatenate([part[side] for part in candidates]) for side in (0, 1))
    rough = [np.einsum("ij,ij->i", vectors[left[part]], vectors[right[part]]) for part in _chunks(len(left))]
    near = np.concatenate(rough) >= floor - FILTER_MARGIN["float32"]
    pairs = Pairs(left[near], right[near], pair_similarities(vectors, left[near], right[near]))
    return pairs.where(pairs.similarity >= np.float32(floor))


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, start + PAIR_ROWS) for start in range(0, rows, PAIR_ROWS))
