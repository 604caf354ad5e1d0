"""`penstock diff` on two versions that a user made."""

import json

import pytest

from penstock.cluster.catalog import Catalog
from penstock.cluster.storage import open_store
from penstock.pipelines.version_samples import sampled_texts

from .conftest import Document, Workspace, penstock

pytestmark = pytest.mark.usefixtures("ray_session")


def test_two_versions_of_an_index(workspace: Workspace, documents: list[Document]) -> None:
    first = workspace.pipeline().run()
    changed = [{**documents[0], "text": "Another text altogether, on whales and ships."}, *documents[2:20]]
    workspace.write("part-0.jsonl", changed)
    workspace.write("more.jsonl", [{"id": "new-1", "text": "A new document on compilers.", "topic": "t"}])
    second = workspace.pipeline().run()
    assert first is not None and second is not None
    assert first.manifest["evaluation"]["shard_recall"] == [1.0, 1.0]
    told = penstock("diff", first.version, second.version, "--root", str(workspace.root), "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout.splitlines()[-1])
    documents_found = found["documents"]
    assert (documents_found["added"], documents_found["removed"], documents_found["changed"]) == (1, 1, 1)
    assert documents_found["unchanged"] == 58
    assert documents_found["examples"] == {"added": ["new-1"], "removed": ["d001"], "changed": ["d000"]}
    assert found["old"]["version"] == first.version and found["new"]["rows"] == second.manifest["rows"]
    assert 0 < found["neighbour_churn_at_10"] < 0.2 and found["queries"] > 40
    view = penstock("diff", first.version, second.version, "--root", str(workspace.root))
    assert "1 added, 1 removed, 1 changed, 58 unchanged" in view.stdout and "new-1" in view.stdout
    same = penstock("diff", second.version, second.version, "--root", str(workspace.root), "--json")
    assert json.loads(same.stdout.splitlines()[-1])["neighbour_churn_at_10"] == 0
    for count in (12, 100):
        texts = sampled_texts(Catalog(open_store(str(workspace.root)), "test"), second.manifest, count)
        assert len(texts) == len(set(texts)) == min(count, second.manifest["rows"])
    unknown = penstock("diff", first.version, "0" * 16, "--root", str(workspace.root))
    assert unknown.returncode == 2 and f"version ({'0' * 16}) must be one of index test" in unknown.stderr
