"""What a search is told: the knobs of each index family, and how faiss and svs are passed them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import faiss

from penstock.operators.indexing import AnyIndex, FaissObject, core_index
from penstock.operators.vamana import DEFAULT_WINDOW, VamanaIndex

_faiss: Any = faiss  # for the search parameter classes that the type stubs of faiss 1.15 leave out
HNSW_ROWS_PER_EF = 32  # rows compared for each step of a search in a graph: about its links
GRAPHS = (faiss.IndexHNSW, VamanaIndex)


@dataclass(frozen=True)
class SearchParameters:
    """How to search: what an operating point stores. None leaves a knob that the index family lacks.

    `rerank_factor` times k candidates are compared again by their stored vectors. `coverage` says which shards a query
    leaves out, where each owns cells: see `routing.route`.
    """

    ef_search: int | None = None
    nprobe: int | None = None
    rerank_factor: int = 1
    coverage: float | None = None

    def __post_init__(self) -> None:
        for name in ("ef_search", "nprobe", "rerank_factor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise ValueError(f"coverage ({self.coverage}) must be above 0 and at most 1: 1 searches all probed cells")

    def to_json(self) -> dict[str, float]:
        """The parameters that are set, for a manifest."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of to_json; unknown names are errors."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(f"search parameter {unknown[0]} ({value[unknown[0]]}) is none of {', '.join(known)}")
        return cls(**value)


def faiss_parameters(index: AnyIndex, parameters: SearchParameters, selector: FaissObject = None) -> FaissObject:
    """The parameters of one call, for svs its window; None where all knobs are left to the index.

    Raises:
        ValueError: for a knob of another family.
    """
    core = core_index(index)
    _refuse_family(core, (faiss.IndexIVF,), "nprobe", parameters.nprobe)
    _refuse_family(core, GRAPHS, "ef_search", parameters.ef_search)
    if isinstance(core, VamanaIndex):
        return parameters.ef_search
    if parameters.nprobe is parameters.ef_search is selector is None:
        return None
    inner = _inner_parameters(core, with_defaults(core, parameters), selector)
    return (
        _faiss.SearchParametersPreTransform(index_params=inner) if isinstance(index, faiss.IndexPreTransform) else inner
    )


def with_defaults(core: FaissObject, parameters: SearchParameters) -> SearchParameters:
    """The parameters with the knob of the index's family as the index has it, unless it is given."""
    if isinstance(core, faiss.IndexIVF) and parameters.nprobe is None:
        return replace(parameters, nprobe=core.nprobe)
    if isinstance(core, faiss.IndexHNSW) and parameters.ef_search is None:
        return replace(parameters, ef_search=core.hnsw.efSearch)
    if isinstance(core, VamanaIndex) and parameters.ef_search is None:
        return replace(parameters, ef_search=DEFAULT_WINDOW)
    return parameters


def widened(core: FaissObject, parameters: SearchParameters, share: float) -> SearchParameters:
    """The parameters that meet as many allowed rows, where only a share of all rows is, as these meet rows."""
    given = with_defaults(core, parameters)
    if given.nprobe is not None:
        return replace(given, nprobe=min(core.nlist, math.ceil(given.nprobe / share)))
    if given.ef_search is not None:
        return replace(given, ef_search=max(given.ef_search, min(core.ntotal, math.ceil(given.ef_search / share))))
    return given


def rows_compared(core: FaissObject, parameters: SearchParameters) -> float:
    """About how many rows a search compares with a query."""
    if parameters.nprobe is not None:
        return float(core.ntotal * parameters.nprobe / core.nlist)
    if parameters.ef_search is not None:
        return float(min(core.ntotal, HNSW_ROWS_PER_EF * parameters.ef_search))
    return float(core.ntotal)


def _inner_parameters(core: FaissObject, parameters: SearchParameters, selector: FaissObject) -> FaissObject:
    chosen = {} if selector is None else {"sel": selector}
    if parameters.nprobe is not None:
        return _faiss.SearchParametersIVF(nprobe=parameters.nprobe, **chosen)
    if parameters.ef_search is not None:
        return _faiss.SearchParametersHNSW(efSearch=parameters.ef_search, **chosen)
    return _faiss.SearchParameters(**chosen)


def _refuse_family(core: FaissObject, expected: tuple[type, ...], name: str, value: int | None) -> None:
    if value is not None and not isinstance(core, expected):
        owners = " and ".join(owner.__name__ for owner in expected)
        raise ValueError(f"{name} ({value}) is no parameter of {type(core).__name__}, but of {owners}; leave it out")
