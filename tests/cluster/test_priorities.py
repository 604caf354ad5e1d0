import numpy as np
import pyarrow as pa
import pytest

from penstock.cluster.fragments import write_fragment
from penstock.cluster.jobs.priorities import FragmentPriority, PriorityTask, fragment_priorities
from penstock.cluster.layout import PASSAGES, fragment_path
from penstock.cluster.storage import Store, open_store


def passages(store: Store, name: str, documents: list[str], visits: list[float | None]) -> None:
    table = pa.table({"document_id": documents, "visits": pa.array(visits, pa.float64()), "words": documents})
    write_fragment(store, fragment_path(PASSAGES, "stage", name), table)


@pytest.fixture
def store(tmp_path: object) -> Store:
    found = open_store(str(tmp_path))
    passages(found, "one", ["a", "a", "b"], [3.0, 3.0, None])
    passages(found, "two", ["c", "d", "e"], [1.0, -5.0, np.nan])
    return found


def task(store: Store, **changes: object) -> PriorityTask:
    values: dict[str, object] = {"traffic": None, "asked": {}, "found": {}} | changes
    return PriorityTask(store.url, "stage", ("one", "two"), **values)  # type: ignore[arg-type]


def test_traffic_is_summed_over_passages_and_what_is_no_count_is_none(store: Store) -> None:
    assert fragment_priorities(task(store, traffic="visits")) == [
        FragmentPriority("one", 6.0, 0.0),
        FragmentPriority("two", 1.0, 0.0),
    ]


def test_documents_that_are_asked_for_count_for_each_passage(store: Store) -> None:
    found = fragment_priorities(task(store, asked={"a": 2.0, "d": 7.0}, found={"b": 5.0, "missing": 9.0}))
    assert found == [FragmentPriority("one", 4.0, 5.0), FragmentPriority("two", 7.0, 0.0)]


def test_traffic_of_words_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match=r"upgrade.traffic \(words\) must be a column of numbers, got string"):
        fragment_priorities(task(store, traffic="words"))
