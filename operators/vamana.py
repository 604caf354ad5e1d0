"""Vamana graphs (Subramanya et al. 2019) of Intel's Scalable Vector Search, the package `scalable-vs`, module `svs`.

An index is named by the factory strings of faiss builds that include svs: `SVSVamana64,LVQ4x8`. Without a code rows are
float32; FP16; LVQ (Aguerrebere et al. 2023) stores 4 or 8 bits a component, and under `x` so many more of what is left
over; LeanVec (Tepper et al. 2024) searches fewer components first, of svs' own principal axes.

svs 0.5 runs LVQ and LeanVec on Intel CPUs only: elsewhere it ends the process. The rest runs on any x86-64, slower
without AVX-512, of which it warns when it is imported.
"""

import importlib
import importlib.metadata
import io
import json
import math
import re
import shutil
import tarfile
import tempfile
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Self

import faiss
import numpy as np

PACKAGE = "scalable-vs"
FACTORY_PREFIX = "SVSVamana"
FACTORY = re.compile(rf"{FACTORY_PREFIX}(\d+)(?:,(FP16|LVQ8|LVQ4x4|LVQ4x8|LeanVec4x8|LeanVec8x8)(?:_(\d+))?)?")
LVQ_BITS = {"LVQ8": (8, 0), "LVQ4x4": (4, 4), "LVQ4x8": (4, 8)}  # of a component, and of what they leave over
LEANVEC_BITS = {"LeanVec4x8": (4, 8), "LeanVec8x8": (8, 8)}  # of a reduced component, and of one of all
LVQ_CONSTANT_BYTES = 4  # offset and scale of a row, float16 each
LEAST_DEGREE = 2
ALPHA = 0.95  # svs prunes by it, with inner products; their documentation's value
DEFAULT_WINDOW = 10  # of a search, svs' own
INTEL = "GenuineIntel"
CPU_FACTS = Path("/proc/cpuinfo")
PARTS = ("config", "graph", "data")  # the folders that svs saves an index as
FACTS = "vamana.json"
SCRATCH_PREFIX = "penstock-vamana-"
MEMBER = re.compile(rf"(?:{'|'.join(PARTS)})(?:/\w[\w.-]*)+")
BLOCK_ROWS = 4_096  # decoded at once: 6 MiB of 384 float32
BLOCK_PAIRS = 2**22  # query times row pairs compared at once: 16 MiB of float32 similarities
HEADER_MAGIC_BYTES, HEADER_ID_BYTES = 8, 16


@dataclass(frozen=True)
class VamanaLayout:
    """What a factory string says.

    Attributes:
        degree: links of a row, at most.
        code: of a row, "" for float32.
        reduced: components that LeanVec searches first, 0 without it.
    """

    dimension: int
    degree: int
    code: str
    reduced: int

    @classmethod
    def parse(cls, factory: str, dimension: int) -> Self:
        """The layout of a factory string.

        Raises:
            ValueError: it is none, or asks for what svs cannot build.
        """
        parts = FACTORY.fullmatch(factory)
        if parts is None:
            codes = ", ".join(["FP16", *LVQ_BITS, *LEANVEC_BITS])
            raise ValueError(
                f"factory ({factory}) must be {FACTORY_PREFIX} with its links, then perhaps a comma and one of "
                f"{codes}, as SVSVamana64,LVQ4x8 or SVSVamana64,LeanVec4x8_192; correct it"
            )
        degree, code = int(parts[1]), parts[2] or ""
        if degree < LEAST_DEGREE:
            raise ValueError(f"factory ({factory}) must have at least {LEAST_DEGREE} links, got {degree}; correct it")
        if code not in LEANVEC_BITS and parts[3]:
            raise ValueError(f"factory ({factory}) must name components ({parts[3]}) with LeanVec only; leave them out")
        reduced = (int(parts[3]) if parts[3] else max(1, dimension // 2)) if code in LEANVEC_BITS else 0
        if not 0 <= reduced <= dimension or (code in LEANVEC_BITS and reduced == 0):
            raise ValueError(
                f"factory ({factory}) must name 1 to {dimension} components, those of the vectors, got {reduced}"
            )
        return cls(dimension, degree, code, reduced)

    @property
    def code_bytes(self) -> float:
        """Bytes of one row's code. Of LVQ and LeanVec as published; svs may pad them."""
        if self.code in LVQ_BITS:
            return sum(_code_bytes(self.dimension, bits) for bits in LVQ_BITS[self.code]) + LVQ_CONSTANT_BYTES
        if self.code in LEANVEC_BITS:
            first, second = LEANVEC_BITS[self.code]
            codes = _code_bytes(self.reduced, first) + _code_bytes(self.dimension, second)
            return codes + 2 * LVQ_CONSTANT_BYTES
        return self.dimension * (2 if self.code else 4)

    @property
    def graph_bytes(self) -> float:
        """Bytes of one row's links, all of which svs reserves: int32 each, and their number."""
        return 4 * (self.degree + 1)


class VamanaBuilder:
    """Fills one shard: rows go to a file, of which svs makes codes and graph when the shard is written.

    Memory while writing: the shard's rows as float32 (float16 with FP16), its codes and its graph. Disk: the rows,
    and the finished shard twice. The file depends on rows and order alone with one thread; several link rows in the
    order in which they come by.

    Args:
        window: candidates for the links of a row.
    """

    def __init__(self, factory: str, dimension: int, window: int, threads: int = 1) -> None:
        self._factory, self._layout = factory, VamanaLayout.parse(factory, dimension)
        refuse_unusable(self._layout.code)
        self._window, self._threads = window, threads
        self._place = tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX)
        half = self._layout.code == "FP16"
        component = np.dtype(np.float16 if half else np.float32)
        # The formats hvecs and fvecs, which svs reads: each row behind its number of components.
        self._row = np.dtype([("dimension", "<i4"), ("vector", component, (dimension,))])
        self._rows_path = Path(self._place.name) / ("rows.hvecs" if half else "rows.fvecs")
        self._rows_file = self._rows_path.open("wb")
        self.ntotal = 0

    def add(self, vectors: np.ndarray) -> None:
        """Adds floating point (n, d) rows behind those added before."""
        if vectors.ndim != 2 or vectors.shape[1] != self._layout.dimension:
            raise ValueError(
                f"vectors to add (shape {vectors.shape}) must be rows of the index's {self._layout.dimension} "
                "dimensions"
            )
        for first in range(0, len(vectors), BLOCK_ROWS):
            block = vectors[first : first + BLOCK_ROWS]
            rows = np.empty(len(block), self._row)
            rows["dimension"], rows["vector"] = self._layout.dimension, block
            rows.tofile(self._rows_file)
        self.ntotal += len(vectors)

    def write(self, path: str | Path) -> None:
        """Builds the index and writes it as one tar file; nothing can be added afterwards.

        Raises:
            OSError: when it cannot be built or written in full.
        """
        self._rows_file.close()
        with self._place as place:
            saved = Path(place) / "saved"
            saved.mkdir()
            if self.ntotal:
                self._save(saved, path)
            facts = {"factory": self._factory, "dimension": self._layout.dimension, "rows": self.ntotal}
            _pack(saved, facts, Path(path))

    def _save(self, folder: Path, path: str | Path) -> None:
        svs = _svs()
        parameters = svs.VamanaBuildParameters(
            alpha=ALPHA, graph_max_degree=self._layout.degree, window_size=self._window
        )
        try:
            index = svs.Vamana.build(parameters, self._loader(svs), svs.DistanceType.MIP, num_threads=self._threads)
            index.save(*(str(folder / part) for part in PARTS))
        except RuntimeError as error:
            raise OSError(f"shard {path} ({self.ntotal} rows) could not be built by svs: {error}") from error
        for part in PARTS:
            _name_binaries(folder / part)

    def _loader(self, svs: Any) -> Any:  # noqa: ANN401 (svs has no types)
        layout = self._layout
        kind = svs.DataType.float16 if layout.code == "FP16" else svs.DataType.float32
        rows = svs.VectorDataLoader(str(self._rows_path), kind, dims=layout.dimension)
        if layout.code in LVQ_BITS:
            primary, residual = LVQ_BITS[layout.code]
            return svs.LVQLoader(rows, primary=primary, residual=residual)
        if layout.code in LEANVEC_BITS:
            kinds = {4: svs.LeanVecKind.lvq4, 8: svs.LeanVecKind.lvq8}
            first, second = LEANVEC_BITS[layout.code]
            return svs.LeanVecLoader(rows, layout.reduced, primary_kind=kinds[first], secondary_kind=kinds[second])
        return rows


class VamanaIndex:
    """An opened shard, in memory: what a search needs of a faiss index, under the same names.

    Threads may share it: one searches at a time, since svs keeps the width of a search as its state. It also keeps
    Python's interpreter lock while it searches, so that the shards of a process take turns.
    """

    metric_type = faiss.METRIC_INNER_PRODUCT

    def __init__(self, index: Any, rows: int, dimension: int) -> None:  # noqa: ANN401 (svs has no types)
        self._index, self.ntotal, self.d = index, rows, dimension
        self._turn = threading.Lock()

    def search(self, queries: np.ndarray, k: int, params: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inner products float32 (q, k) and rows int64 (q, k), most similar first; -1 where the graph leads to no more.

        Args:
            queries: contiguous float32 (q, d).
            k: at most the rows there are.
            params: the search window, as wide as k at least.
        """
        with self._turn:
            self._index.search_window_size = max(k, DEFAULT_WINDOW if params is None else params)
            found, near = self._index.search(queries, k)
        rows = found.astype(np.int64)
        # svs fills places that it finds nothing for with row 0 and similarity 0.
        rows[(rows == 0) & (near == 0)] = -1
        return near, rows

    def search_rows(self, queries: np.ndarray, k: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The k most similar of some rows, int64 (n,) with n >= k: each is decoded and compared. As search()."""
        near: np.ndarray = np.full((len(queries), k), -np.inf, np.float32)
        found: np.ndarray = np.full((len(queries), k), -1, np.int64)
        step = max(1, min(BLOCK_ROWS, BLOCK_PAIRS // max(1, len(queries))))
        for first in range(0, len(rows), step):
            block = rows[first : first + step]
            compared = queries @ self._index.reconstruct(block.astype(np.uint64)).T
            near = np.concatenate([near, compared], axis=1)
            found = np.concatenate([found, np.broadcast_to(block, compared.shape)], axis=1)
            best = np.argsort(-near, axis=1, kind="stable")[:, :k]
            near, found = (np.take_along_axis(values, best, axis=1) for values in (near, found))
        return near, found


def svs_version() -> str | None:
    """The version of svs that is installed; None without."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_vendor() -> str:
    """The CPU's vendor by its own word, as `GenuineIntel`; `unknown` where the system does not tell."""
    try:
        facts = CPU_FACTS.read_text()
    except OSError:
        return "unknown"
    named = re.search(r"^vendor_id\s*:\s*(\S+)", facts, re.MULTILINE)
    return named[1] if named else "unknown"


def refuse_unusable(code: str) -> None:
    """Refuses a code where svs cannot run it.

    Raises:
        ValueError: svs is not installed, or the code needs another CPU.
    """
    if svs_version() is None:
        raise ValueError(
            "family (vamana) needs the package scalable-vs, which is not installed here; "
            "pip install 'penstock[svs]' (Linux on x86-64), or take family hnsw"
        )
    if (code in LVQ_BITS or code in LEANVEC_BITS) and cpu_vendor() != INTEL:
        raise ValueError(
            f"code ({code}) of family vamana needs an Intel CPU, as svs ends the process on another one, got "
            f"{cpu_vendor()}; take codec none or fp16, or family hnsw or ivf"
        )


def open_vamana(path: str | Path, scratch: str | Path | None = None) -> VamanaIndex:
    """Reads a shard into memory.

    Args:
        scratch: folder in which the file is unpacked for the moment; without it, that of the system's temporary files.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a complete index, or this process cannot run it.
    """
    refuse_unusable("")
    size_bytes = Path(path).stat().st_size
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=scratch) as place:
        try:
            facts = _unpack(Path(path), Path(place))
        except (tarfile.TarError, EOFError, LookupError, ValueError) as error:
            raise _incomplete(path, size_bytes, error) from error
        refuse_unusable(facts.layout.code)
        try:
            index = _loaded(Path(place)) if facts.rows else None
        except RuntimeError as error:
            raise _incomplete(path, size_bytes, error) from error
    return VamanaIndex(index, facts.rows, facts.layout.dimension)


@dataclass(frozen=True)
class _Facts:
    """What the first member of a shard's file says."""

    layout: VamanaLayout
    rows: int


def _incomplete(path: str | Path, size_bytes: int, error: Exception) -> ValueError:
    return ValueError(
        f"index file {path} ({size_bytes} bytes) is not a complete svs index: {error}; compare its sha256 with the "
        "manifest and fetch or build it again"
    )


def _svs() -> Any:  # noqa: ANN401 (svs has no types)
    return importlib.import_module("svs")


def _code_bytes(components: int, bits: int) -> int:
    return math.ceil(components * bits / 8)


def _name_binaries(folder: Path) -> None:
    """Gives svs' files the identity of their place: svs draws one for each, which would tell equal indexes apart.

    A file carries it behind its first bytes, the configuration beside it as text.
    """
    config = folder / "svs_config.toml"
    text = config.read_text()
    for binary in sorted(folder.glob("*.svs")):
        with binary.open("r+b") as file:
            file.seek(HEADER_MAGIC_BYTES)
            drawn = uuid.UUID(int=int.from_bytes(file.read(HEADER_ID_BYTES), "little"))
            if str(drawn) in text:
                named = uuid.uuid5(uuid.NAMESPACE_OID, f"{folder.name}/{binary.name}")
                text = text.replace(str(drawn), str(named))
                file.seek(HEADER_MAGIC_BYTES)
                file.write(named.int.to_bytes(HEADER_ID_BYTES, "little"))
    config.write_text(text)


def _pack(saved: Path, facts: dict[str, Any], path: Path) -> None:
    """One tar file, not compressed, the same for the same contents: sorted members without times and owners."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        data = json.dumps(facts, sort_keys=True).encode()
        _append(archive, FACTS, len(data), io.BytesIO(data))
        for member in sorted(file for file in saved.rglob("*") if file.is_file()):
            with member.open("rb") as stream:
                _append(archive, member.relative_to(saved).as_posix(), member.stat().st_size, stream)


def _append(archive: tarfile.TarFile, name: str, size_bytes: int, stream: BinaryIO) -> None:
    header = tarfile.TarInfo(name)
    header.size = size_bytes
    archive.addfile(header, stream)


def _unpack(path: Path, place: Path) -> _Facts:
    """Writes the members below a folder; only names that _pack() gives."""
    with tarfile.open(path, "r:") as archive:
        facts = json.loads(_contents(archive, archive.getmember(FACTS)).read())
        for member in archive:
            if member.name == FACTS:
                continue
            if not MEMBER.fullmatch(member.name):
                raise ValueError(f"it holds {member.name!r}")
            target = place / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(_contents(archive, member), file)
    return _Facts(VamanaLayout.parse(facts["factory"], int(facts["dimension"])), int(facts["rows"]))


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member) if member.isfile() else None
    if stream is None:
        raise ValueError(f"{member.name} is no file")
    return stream


def _loaded(place: Path) -> Any:  # noqa: ANN401 (svs has no types)
    svs = _svs()
    config, graph, data = (str(place / part) for part in PARTS)
    loaders = svs.GraphLoader(graph), svs.SerializedObject(data)
    return svs.Vamana(config, *loaders, svs.DistanceType.MIP, num_threads=1)
