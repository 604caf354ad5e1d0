"""`index.family: auto`, `penstock tune` and its picture, as a user meets them."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from penstock.pipelines.config import PipelineFile
from penstock.pipelines.history import Status
from penstock.pipelines.loading import PipelineFileInvalid
from penstock.pipelines.plots import keeps, tuning_svg
from penstock.pipelines.tuning import unmet

from .conftest import Workspace, penstock


def record(**budget: float | None) -> dict[str, Any]:
    def trial(factory: str, family: str, queries_per_s: float, size: float, recall: float) -> dict[str, Any]:
        return {
            "family": family,
            "codec": "none",
            "rerank": family == "ivf",
            "factory": factory,
            "rows": 1000,
            "shard_rows": 1000,
            "parameters": {"rerank_factor": 1},
            "recall": recall,
            "queries_per_s": queries_per_s,
            "latency_ms": 0.5,
            "bytes_per_vector": size,
            "rerank_bytes": 0.0,
            "build_s": 1.0,
        }

    trials = [trial("Flat", "flat", 100.0, 1536.0, 1.0), trial("IVF64,<Flat>", "ivf", 9000.0, 60.0, 0.7)]
    asked = {"recall": 0.95, "k": 10, "bytes_per_vector": None, "latency_ms": None} | budget
    return {"budget": asked, "trials": trials, "pareto": trials, "chosen": trials[0], "met": True, "misses": {}}


def test_the_picture_is_valid_and_names_all(tmp_path: Path) -> None:
    found = ElementTree.fromstring(tuning_svg(record()))
    words = [text for element in found.iter() if (text := element.text)]
    assert any("Flat" in word for word in words) and any("IVF64,<Flat> + re-ranking" in word for word in words)
    circles = [element for element in found.iter() if element.tag.endswith("circle")]
    fills = [circle.get("fill") for circle in circles]
    assert fills.count("white") == 1  # the one below the recall
    for circle in circles:
        assert 0 < float(circle.get("cx", "0")) < 860 and 0 < float(circle.get("cy", "0")) < 520


def texts_of(svg: str) -> list[str]:
    return [text for element in ElementTree.fromstring(svg).iter() if (text := element.text)]


def test_the_picture_shows_what_was_only_screened_and_what_is_allowed() -> None:
    """Once each, by the last estimate, and with the lists of a whole shard."""
    base = record(bytes_per_vector=500.0)
    lists = base["trials"][1] | {"nlist": 64, "factory": "PCA192,IVF20,<Flat>", "reduced": 192, "rows": 500}
    screened = [lists | {"rows": 100}, lists | {"queries_per_s": 5000.0}, base["trials"][0]]
    svg = tuning_svg(base | {"screened": screened})
    words = texts_of(svg)
    assert words.count("PCA192,IVF64,<Flat> +r") == 1 and "IVF20" not in svg
    assert any("at most 500 bytes per vector" in word for word in words)
    assert any("on 1,000 vectors, faint: estimated from ≤ 500" in word for word in words)
    lines = [element for element in ElementTree.fromstring(svg).iter() if element.get("stroke-dasharray")]
    assert len(lines) == 1 and 80 < float(lines[0].get("x1", "0")) < 830
    assert not any("faint" in word for word in texts_of(tuning_svg(base)))


def test_the_line_joins_what_keeps_the_recall_and_none_as_small_is_faster_than() -> None:
    base = record()
    sizes = ((50.0, 100.0, 0.96), (60.0, 90.0, 0.99), (70.0, 300.0, 0.95), (80.0, 900.0, 0.5), (90.0, 301.0, 0.97))
    flat = base["trials"][0]
    trials = [flat | {"bytes_per_vector": b, "queries_per_s": q, "recall": r} for b, q, r in sizes]
    root = ElementTree.fromstring(tuning_svg(base | {"trials": trials}))
    (line,) = [element for element in root.iter() if element.tag.endswith("polyline")]
    marks = [element for element in root.iter() if element.get("r") == "5" and float(element.get("cy", "0")) > 64]
    expected = [f"{marks[number].get('cx')},{marks[number].get('cy')}" for number in (0, 2, 4)]
    assert line.get("points", "").split() == expected


def test_labels_stay_apart() -> None:
    base = record()
    crowd = [base["trials"][0] | {"bytes_per_vector": 100.0 + number} for number in range(30)]
    labels = [one for one in ElementTree.fromstring(tuning_svg(base | {"trials": crowd})).iter() if one.text == "Flat"]
    places = [(float(one.get("x", "0")), float(one.get("y", "0"))) for one in labels]
    assert 0 < len(labels) < len(crowd)
    for number, (across, down) in enumerate(places):
        assert all(abs(across - x) >= 24 or abs(down - y) >= 12 for x, y in places[:number])


def test_what_keeps_a_budget() -> None:
    flat, lists = record()["trials"]
    assert keeps(flat, record()["budget"]) and not keeps(lists, record()["budget"])
    assert not keeps(flat, record(bytes_per_vector=100.0)["budget"])
    assert not keeps(flat, record(latency_ms=0.1)["budget"])


def test_an_unmet_budget_says_what_comes_nearest() -> None:
    missed = record(bytes_per_vector=100.0) | {"misses": {"bytes_per_vector": 14.36}}
    assert unmet(missed) == (
        "index: no configuration that was measured keeps bytes_per_vector 100 (nearest: 1536); the nearest is Flat"
    )
    lossy = record() | {"misses": {"recall": 0.26}, "chosen": record()["trials"][1]}
    assert unmet(lossy) == (
        "index: no configuration that was measured keeps recall 0.95 (nearest: 0.7); the nearest is IVF64,<Flat> "
        "with re-ranking"
    )


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"codec": "sq8"}, "codec (sq8) is chosen by family auto"),
        ({"family": "auto", "rerank": True}, "rerank (True) is chosen by family auto"),
        ({"family": "hnsw", "bytes_per_vector": 64}, "bytes_per_vector (64.0) is what family auto chooses by"),
        ({"family": "flat", "memory_gib": 2}, "memory_gib (2.0) is what family auto chooses by"),
    ],
)
def test_options_that_contradict_each_other(index: dict[str, Any], words: str) -> None:
    base = {"name": "a", "root": "r", "documents": {"type": "jsonl", "path": "x"}, "embedding": {"model": "m"}}
    with pytest.raises(ValueError) as raised:
        PipelineFile.model_validate({**base, "index": index})
    assert words in str(raised.value)


# ---- runs


AUTO = {"shards": 1, "recall": 0.9, "latency_ms": 1000.0}


@pytest.mark.usefixtures("ray_session")
def test_a_run_chooses_by_measurement_once_and_builds_that(workspace: Workspace) -> None:
    before = {stage.name: stage for stage in workspace.pipeline(index=AUTO).plan().stages}
    assert before["shards"].fingerprint is None
    report = workspace.pipeline(index=AUTO, gate={"recall": 0.9}).run()
    assert report is not None and report.status is Status.PUBLISHED and report.tuning is not None
    chosen, tried = report.tuning["chosen"], report.tuning["trials"]
    assert report.tuning["met"] and chosen["recall"] >= 0.9 and len(tried) > 8
    assert chosen["queries_per_s"] == max(one["queries_per_s"] for one in tried if one["recall"] >= 0.9)
    assert report.manifest["faiss"]["family"] == chosen["family"]
    assert report.manifest["faiss"]["codec"] == chosen["codec"] and report.manifest["rerank"] == chosen["rerank"]
    again = workspace.pipeline(index=AUTO, gate={"recall": 0.9})
    assert again.plan().up_to_date and again.run() is None
    workspace.write("more.jsonl", [{"id": "more", "text": "One more document on arrays.", "topic": "t"}])
    later = workspace.pipeline(index=AUTO, gate={"recall": 0.9}).run()
    assert later is not None and later.tuning == report.tuning  # a little growth does not choose anew
    assert later.version != report.version


@pytest.mark.usefixtures("ray_session")
def test_tuning_again_replaces_the_choice_and_a_resumed_run_still_tells_of_it(workspace: Workspace) -> None:
    asked = workspace.pipeline(index=AUTO, gate={"recall": 0.9})
    first = asked.tune()
    (path,) = (workspace.root / "tuning").glob("*.json")
    assert json.loads(path.read_text()) == first
    second = asked.tune()
    assert json.loads(path.read_text()) == second and second["measured"] >= first["measured"]
    report = asked.run()
    assert report is not None and report.tuning == second
    stricter = workspace.pipeline(index=AUTO, gate={"recall": 0.91}).run()
    assert stricter is not None and stricter.tuning == second


@pytest.mark.usefixtures("ray_session")
def test_a_choice_that_the_corpus_is_now_too_small_to_train_is_made_again(workspace: Workspace) -> None:
    asked = workspace.pipeline(index=AUTO, gate={"recall": 0.9})
    record = asked.tune()
    (path,) = (workspace.root / "tuning").glob("*.json")
    lists = {"family": "ivf", "codec": "none", "rerank": False, "nlist": 5000, "parameters": {"nprobe": 9}}
    path.write_text(json.dumps(record | {"chosen": record["chosen"] | lists}))  # as of more passages than there are
    assert asked.plan().version is None
    report = asked.run()
    assert report is not None and report.status is Status.PUBLISHED
    assert report.tuning == json.loads(path.read_text()) and report.tuning["chosen"].get("nlist") != 5000
    assert asked.plan().up_to_date


@pytest.mark.usefixtures("ray_session")
def test_memory_that_no_index_keeps_is_refused_before_anything_is_embedded(workspace: Workspace) -> None:
    with pytest.raises(PipelineFileInvalid, match=r"index: memory_gib \(1e-06\) for \d+ vectors: bytes_per_vector"):
        workspace.pipeline(index={"memory_gib": 1e-6}).run()
    assert not list(workspace.root.glob("stages/embeddings/*/*.parquet"))


@pytest.mark.usefixtures("ray_session")
def test_few_vectors_are_searched_exactly(workspace: Workspace) -> None:
    report = workspace.pipeline(index={"shards": 1}).run()
    assert report is not None and report.status is Status.PUBLISHED
    assert report.manifest["faiss"] == {
        "family": "flat",
        "codec": "none",
        "factory": "Flat",
        "dimension": 384,
        "seed": 20_260_101,
    }
    assert report.tuning is not None and "trials" not in report.tuning


def test_the_command_shows_measures_and_draws(workspace: Workspace, tmp_path: Path) -> None:
    picture = tmp_path / "tuning.svg"
    file = workspace.file(index=AUTO)
    done = penstock("tune", str(file), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert "chosen" in done.stdout and "queries/s" in done.stdout and "Flat" in done.stdout
    assert "PCA192,HNSW16_SQ8 + re-ranking" in done.stdout
    ElementTree.fromstring(picture.read_text())
    few = workspace.file(index={"shards": 1})
    unmeasured = penstock("tune", str(few), "--plot", str(tmp_path / "nothing.svg"))
    assert unmeasured.returncode == 0 and not (tmp_path / "nothing.svg").exists()
    assert "nothing.svg) is not written: nothing was measured, as " in unmeasured.stderr
    assert "vectors a shard are searched exactly" in unmeasured.stderr
    impossible = workspace.file(index={**AUTO, "bytes_per_vector": 90.0, "recall": 1.0})
    missed = penstock("tune", str(impossible), "--json")
    words = "no configuration that was measured keeps bytes_per_vector 90 (nearest: "  # code books weigh on few rows
    assert missed.returncode == 3 and words in missed.stderr
    found = json.loads(missed.stdout.splitlines()[-1])
    assert found["event"] == "tuning" and not found["met"] and found["misses"]["bytes_per_vector"] > 0
    assert found["trials"] and all(trial["codec"] not in ("none", "fp16") for trial in found["trials"])
