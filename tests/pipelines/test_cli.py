"""The command line as people and machines use it: output, JSON, exit codes."""

import json
from pathlib import Path

import pytest

from penstock.pipelines.config import PipelineFile

from .conftest import Document, Workspace, penstock


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, real_texts: list[str]) -> Workspace:
    """Two versions of a small index: `live` points to the second."""
    workspace = Workspace(tmp_path_factory.mktemp("cli"))
    rows: list[Document] = [{"id": f"d{i}", "text": real_texts[i], "topic": f"t{i % 2}"} for i in range(20)]
    workspace.write("part-0.jsonl", rows[:10])
    first = penstock("run", str(workspace.file()))
    assert first.returncode == 0, first.stderr
    workspace.write("part-1.jsonl", rows[10:])
    second = penstock("run", str(workspace.file()), "--json")
    assert second.returncode == 0, second.stderr
    events = [json.loads(line) for line in second.stdout.splitlines()]
    assert {event["event"] for event in events} >= {"stage_started", "stage_finished", "report"}
    assert events[-1]["event"] == "report" and events[-1]["status"] == "published"
    return workspace


def versions(workspace: Workspace) -> list[dict[str, object]]:
    done = penstock("versions", "--root", str(workspace.root), "--json")
    records: list[dict[str, object]] = json.loads(done.stdout)
    return records


def test_run_says_that_there_is_nothing_to_do(published: Workspace) -> None:
    done = penstock("run", str(published.file()))
    assert done.returncode == 0 and "Nothing to do" in done.stdout and not done.stderr
    record = json.loads(penstock("run", str(published.file()), "--json").stdout)
    assert record["up_to_date"] is True


def test_plan_shows_stages_reasons_and_sizes(published: Workspace) -> None:
    done = penstock("plan", str(published.file()), "--set", "index.family=hnsw", "--json")
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert stages["embeddings"]["todo"] == 0 and stages["embeddings"]["why"] == "unchanged"
    assert stages["shards"]["todo"] == 2 and stages["shards"]["rows"] > 0 and stages["shards"]["bytes_to_read"] > 0
    assert stages["training"]["why"] == "changed parameter: index.family flat → hnsw"
    shown = penstock("plan", str(published.file(passages__overlap=4))).stdout
    assert "passages.overlap 8 → 4" in " ".join(shown.split())


def test_search_answers_people_and_machines(published: Workspace, real_texts: list[str]) -> None:
    question = " ".join(real_texts[12].split()[:20])
    arguments = ("search", "live", question, "--root", str(published.root), "--k", "3")
    shown = penstock(*arguments)
    assert shown.returncode == 0 and "d12#0" in shown.stdout and "topic: t0" in shown.stdout
    answers = json.loads(penstock(*arguments, "--json").stdout)["results"][0]["answers"]
    assert [answer["similarity"] for answer in answers] == sorted((a["similarity"] for a in answers), reverse=True)
    assert answers[0]["document_id"] == "d12" and answers[0]["snippet"] in " ".join(real_texts[12].split())
    unknown = penstock("search", "nothing", "text", "--root", str(published.root))
    assert unknown.returncode == 2 and "test/live" in unknown.stderr


def test_rollback_and_promote_move_the_alias(published: Workspace) -> None:
    before, now = (str(record["version"]) for record in versions(published))
    root = ("--root", str(published.root))
    back = penstock("rollback", "live", *root)
    assert back.returncode == 0 and before in back.stdout
    again = penstock("rollback", "live", *root)
    assert again.returncode == 2 and "earlier published version" in again.stderr
    forth = penstock("promote", "live", now, *root)
    assert forth.returncode == 0 and now in forth.stdout
    assert [record["aliases"] for record in versions(published)] == ["", "live"]
    assert penstock("promote", "live", "nosuchversion", *root).returncode == 2
    assert penstock("promote", "canary", before, *root, "--json").returncode == 0
    assert [record["aliases"] for record in versions(published)] == ["canary", "live"]


def test_failed_gate_exits_with_3_says_by_how_much_and_is_never_promoted(published: Workspace) -> None:
    published.write("part-2.jsonl", [{"id": "blank", "text": " ", "topic": "x"}])
    done = penstock("run", str(published.file(gate__max_dropped_fraction=0.0)))
    (published.corpus / "part-2.jsonl").unlink()
    assert done.returncode == 3
    assert "dropped fraction 0.0476 ≤ 0: missed by 0.0476" in " ".join(done.stdout.split())
    failed = next(record for record in versions(published) if str(record["gate"]).startswith("failed"))
    promoted = penstock("promote", "live", str(failed["version"]), "--root", str(published.root))
    assert promoted.returncode == 3 and "never promoted" in promoted.stderr


def test_status_lists_runs(published: Workspace) -> None:
    records = json.loads(penstock("status", "--root", str(published.root), "--json").stdout)
    assert [record["status"] for record in records[:2]] == ["published", "published"]
    assert records[0]["pipeline"]["documents"]["type"] == "jsonl"
    assert "published" in penstock("status", "--root", str(published.root)).stdout


def test_gc_removes_only_what_no_kept_version_needs(published: Workspace) -> None:
    root = ("--root", str(published.root))
    refused = penstock("gc", *root, "--grace-hours", "0")
    assert refused.returncode == 2 and "readers" in refused.stderr
    live = next(record for record in versions(published) if "live" in str(record["aliases"]))
    assert penstock("promote", "canary", str(live["version"]), *root).returncode == 0
    for alias in published.root.glob("indexes/test/aliases/*"):
        for entry in sorted(alias.glob("*.json"))[:-1]:
            entry.unlink()  # with which a rollback has nothing to return to
    young = json.loads(penstock("gc", *root, "--keep", "1", "--json").stdout)
    assert young["removed"] == []
    files = sorted(path for path in published.root.rglob("*") if path.is_file())
    would = json.loads(penstock("gc", *root, "--keep", "1", "--grace-hours", "0.0000001", "--dry-run", "--json").stdout)
    assert would["removed"] and sorted(path for path in published.root.rglob("*") if path.is_file()) == files
    done = json.loads(penstock("gc", *root, "--keep", "1", "--grace-hours", "0.0000001", "--json").stdout)
    assert [removal["what"] for removal in done["removed"]] == [removal["what"] for removal in would["removed"]]
    # What aliases point to still reads, and the present state of the corpus needs no work.
    assert penstock("search", "live", "text", *root).returncode == 0
    assert penstock("search", "canary", "text", *root).returncode == 0
    plan = json.loads(penstock("plan", str(published.file()), "--json").stdout)
    assert plan["up_to_date"] is True


def test_validate_and_schema(published: Workspace, tmp_path: Path) -> None:
    valid = penstock("validate", str(published.file()))
    assert valid.returncode == 0 and "files: 2, fragments: 1" in valid.stdout
    broken = tmp_path / "broken.yaml"
    broken.write_text(published.yaml(index__shard=3, passages__tokens="many") + "\npublsh: {}\n", "utf-8")
    done = penstock("validate", str(broken))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{broken}:") for line in lines)
    assert "did you mean shards?" in done.stderr and "did you mean publish?" in done.stderr
    assert json.loads(penstock("schema").stdout) == PipelineFile.model_json_schema()
    assert penstock("run", str(tmp_path / "absent.yaml")).returncode == 2
    assert penstock("run").returncode == 2
