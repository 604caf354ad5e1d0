"""A backfill after clean-up, in a window, of a corpus that changes, and of parts that are unlike the whole."""

import json
import shutil
import sys
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from penstock.cluster.catalog import Catalog
from penstock.cluster.layout import EMBEDDINGS, PASSAGES
from penstock.cluster.leases import Lease, acquire
from penstock.cluster.session import Session
from penstock.cluster.storage import open_store
from penstock.operators.indexing import Family
from penstock.operators.mixed_spaces import QueryMode
from penstock.pipelines.backfill_units import finished_of, recorded_slices
from penstock.pipelines.backfilling import AliasHead, Backfill, part_of
from penstock.pipelines.planning import FragmentFacts, Resolved, finished_fragments
from penstock.pipelines.progress import SilentReporter
from penstock.pipelines.running import prepare
from penstock.pipelines.window_embedding import WindowEmbedding

from .conftest import Workspace

FOLDER = "upgrades/test/0123456789abcdef"
DAY = datetime(2026, 11, 21)
SAME = 30  # documents of the first file that say the same in other words


@dataclass
class Warnings(SilentReporter):
    """Keeps what it is warned of."""

    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass
class Clock:
    """A clock that pauses move on, and which may let a lease go then."""

    time: datetime
    held: list[Lease] = field(default_factory=list)
    pauses: int = 0

    def now(self) -> datetime:
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)
        self.pauses += 1
        if self.held:
            self.held.pop().release()


@pytest.fixture(scope="module")
def made(ray_session: Session, tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Workspace:
    """Three files, published with the old model."""
    settings = {
        "index": {"family": "flat", "shards": 1, "recall": 1.0},
        "documents__fragment_bytes": 2_048,
        "documents__keep": {"topic": "string", "visits": "int64"},
        "upgrade": {"steps": 3, "traffic": "visits"},
    }
    workspace = Workspace(tmp_path_factory.mktemp("backfilling"), settings)
    base = next(text for text in real_texts[22:] if 80 < len(text) < 120)
    words = sorted(set(" ".join(real_texts).split()))[:: len(real_texts) // 10][:SAME]
    texts = [f"{base} Please note: {word}." for word in words] + real_texts[2:22]
    documents = [
        {"id": f"d{number:02d}", "text": text, "topic": "t", "visits": 1 + 9 * (number % 7 == 0)}
        for number, text in enumerate(texts)
    ]
    first = len(documents) - 20
    assert first == SAME
    for file, some in enumerate((documents[:first], documents[first : first + 10], documents[first + 10 :])):
        workspace.write(f"part-{file}.jsonl", some)
    assert workspace.pipeline(embedding__layers=3, embedding__layers_trained=True).run() is not None
    return workspace


@pytest.fixture
def workspace(made: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(made.folder, tmp_path / "copy")
    return Workspace(tmp_path / "copy", made.settings)


def prepared(session: Session, workspace: Workspace, **changes: object) -> tuple[Resolved, list[FragmentFacts]]:
    pipeline, store = workspace.pipeline(**changes), open_store(str(workspace.root))
    return prepare(pipeline.plan(), pipeline.origin, store, session, SilentReporter())


def backfill_of(session: Session, workspace: Workspace, **changes: object) -> Backfill:
    new, facts = prepared(session, workspace, **changes)
    pipeline, store = workspace.pipeline(**changes), open_store(str(workspace.root))
    catalog = Catalog(store, "test")
    entry = catalog.alias("live")
    assert entry is not None
    return Backfill(
        session, store, SilentReporter(), pipeline.origin, FOLDER, new.pipeline.upgrade,
        AliasHead(catalog, "live", entry.number), entry.version, new.pipeline.index, new, facts, "", QueryMode.BOTH,
    )  # fmt: skip


def slice_files(workspace: Workspace, backfill: Backfill) -> list[Path]:
    folder = workspace.root / "stages/passages" / backfill.new.stage_fingerprint(PASSAGES)
    return [folder / f"{unit.facts.passages}.parquet" for unit in backfill.units if unit.is_slice]


def test_slices_that_clean_up_took_are_made_again(ray_session: Session, workspace: Workspace) -> None:
    backfill = backfill_of(ray_session, workspace)
    files = slice_files(workspace, backfill)
    before = [path.read_bytes() for path in files]
    assert len(files) > 1
    files[0].unlink()
    again = backfill_of(ray_session, workspace)
    assert again.units == backfill.units
    assert [path.read_bytes() for path in files] == before

    # what is embedded of the corpus when some slices and a fragment are
    slices = recorded_slices(again.store, FOLDER, again.facts)
    assert [one.facts.passages for one in slices] == [path.stem for path in files]
    whole = next(fact for fact in again.facts if fact.passages == slices[0].of)
    again.embedding.embed(again.new, [whole, *(one.facts for one in slices)], [one.facts for one in slices])
    done = finished_fragments(again.store, EMBEDDINGS, again.new.stage_fingerprint(EMBEDDINGS))
    finished = finished_of(again.new, again.facts, slices, done)
    assert finished == [whole, *(one.facts for one in slices if one.of != whole.passages)]
    assert json.loads((workspace.root / FOLDER / "upgrade.json").read_text()) == {}, "its time tells of the work"


def test_a_step_of_a_smaller_corpus_leaves_more_to_do(ray_session: Session, workspace: Workspace) -> None:
    backfill = backfill_of(ray_session, workspace)
    parts = backfill.parts()
    assert len(parts) == 3
    rows = {fact.passages: fact.kept for fact in (*backfill.facts, *(unit.facts for unit in backfill.units))}
    first, second = (sum(rows[name] for name in part) for part in parts[1:])
    path = workspace.root / FOLDER / "steps/000.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": first, "share": 0.95}))  # of a corpus that had hardly more
    assert backfill.left() == parts[2:]
    path.write_text(json.dumps({"rows": first - 1, "share": 0.95}))
    assert backfill.left() == parts[1:]
    path.write_text(json.dumps({"rows": second, "share": 0.1}))  # of a corpus that had many more
    assert backfill.left() == []


def test_a_window_that_closes_during_a_wait_is_waited_for_again(ray_session: Session, workspace: Workspace) -> None:
    """It opens at 01:00 while another run holds the lease, and is closed when that ends."""
    new, facts = prepared(ray_session, workspace)
    store, warnings = open_store(str(workspace.root)), Warnings()
    clock = Clock(DAY.replace(hour=5, minute=59, second=59), [acquire(store, "test", "scheduled")])
    window = WindowEmbedding(
        ray_session, store, warnings, workspace.pipeline().origin, FOLDER, "01:00-06:00", clock.now, clock.pause
    )
    fact = max(facts, key=lambda fact: fact.kept)
    assert window.embed(new, [fact]) == fact.kept > 0
    assert clock.time == DAY.replace(hour=1) + timedelta(days=1) and warnings.warnings == []


@pytest.mark.slow
def test_a_window_in_which_nothing_is_embedded_is_told_of_once(ray_session: Session, workspace: Workspace) -> None:
    new, facts = prepared(ray_session, workspace)
    store, warnings = open_store(str(workspace.root)), Warnings()

    def now() -> datetime:
        """Twice there is nothing left of the window when it is looked at."""
        looks.append(0)
        return DAY.replace(hour=5, minute=59, second=59, microsecond=999_999) if len(looks) < 5 else DAY.replace(hour=1)

    looks: list[int] = []
    window = WindowEmbedding(ray_session, store, warnings, workspace.pipeline().origin, FOLDER, "01:00-06:00", now)
    fact = max(facts, key=lambda fact: fact.kept)
    assert window.embed(new, [fact]) == fact.kept > 0
    assert warnings.warnings == [
        "upgrade.window (01:00-06:00) must be open for longer than encoders take to start: it closed before any of 1 "
        "fragments was embedded; widen it"
    ]


def test_bounds_of_the_whole_corpus_stop_no_part(workspace: Workspace) -> None:
    new = workspace.pipeline(gate={"recall": 0.9, "max_dropped_fraction": 0.01, "max_lost_files": 1}).plan().resolved
    gate = part_of(new, new.pipeline.index, 100).pipeline.gate
    assert gate is not None
    assert (gate.recall, gate.coverage) == (0.9, 1.0)
    assert (gate.max_dropped_fraction, gate.max_lost_files) == (1.0, sys.maxsize)


def test_a_part_of_which_too_few_are_left_without_duplicates_is_searched_exhaustively(
    ray_session: Session, workspace: Workspace
) -> None:
    index = {"family": "ivf", "nlist": 8, "shards": 1, "recall": 1.0}
    rule = {"type": "semantic", "similarity": 0.8}
    backfill = backfill_of(ray_session, workspace, index=index, deduplicate=rule)
    part = max(backfill.facts, key=lambda fact: fact.documents_out)
    assert part_of(backfill.new, backfill.old_index, part.kept).pipeline.index.family is Family.IVF
    version = backfill._build([part.passages])
    manifest = backfill.catalog.manifest(version)
    assert 0 < manifest["rows"] < 8 <= part.kept
    assert manifest["faiss"]["family"] == Family.FLAT
