"""Bridges between an old and a new model, kept under `bridges/`: adapters that passed their gate, each with its record.

`record.json`, written last, says what was measured of both directions, those that were refused included.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.adapters import Adapter
from penstock.operators.backfill_order import adapter_residuals
from penstock.operators.bridge_trials import BridgeTask, FittedBridge, fit_bridge
from penstock.operators.bridging import LEAST_RECOVERY, BridgeRecord, Direction, Verdict, WrongSpace
from penstock.operators.identity import fingerprint
from penstock.operators.paired_samples import PairedSample, sampled_compatibility
from penstock.pipelines.canary_sample import TakenSample
from penstock.pipelines.progress import Reporter
from penstock.pipelines.records import read_json, write_json

BRIDGES_VERSION = 2
RECORD = "record.json"


def fit_bridges(
    session: Session,
    store: Store,
    reporter: Reporter,
    taken: TakenSample,
    least_recovery: float = LEAST_RECOVERY,
    declared_compatible: bool = False,
) -> dict[str, Any]:
    """Fit, choose and judge adapters in both directions, and keep those that pass; the record, as JSON.

    Bridges that were fitted before to the same sample under the same gate are not fitted again. A model that is
    declared compatible with the old one needs none if, and only if, it is measured to be.

    Args:
        least_recovery: the share of the reference that an adapter must recover with its lower confidence bound.
    """
    name = fingerprint(
        stage="bridges",
        version=BRIDGES_VERSION,
        sample=taken.fingerprint,
        least_recovery=least_recovery,
        declared=declared_compatible,
    )
    found = read_json(store, _record_path(name))
    if found is not None:
        return found
    with reporter.stage("bridges", len(Direction), "directions") as advance:
        compatibility = session.run(sampled_compatibility, taken.paired)
        compatible = compatibility is not None and compatibility.compatible
        directions: dict[str, Any] = {}
        tasks = [BridgeTask(taken.paired, direction, least_recovery) for direction in Direction]
        for fitted in session.stream(fit_bridge, [] if declared_compatible and compatible else tasks):
            directions[fitted.record.direction.value] = _stored(store, name, fitted)
            advance(1, fitted.record.direction.value)
    record = {
        "version": BRIDGES_VERSION,
        "fingerprint": name,
        "sample": taken.fingerprint,
        "old": asdict(taken.paired.old.identity),
        "new": asdict(taken.paired.new.identity),
        "seed": taken.paired.seed,
        "least_recovery": least_recovery,
        "declared_compatible": declared_compatible,
        "compatible": compatible,
        "compatibility": compatibility.to_json() if compatibility else None,
        "skipped": declared_compatible and compatible,
        "directions": directions,
    }
    write_json(store, _record_path(name), record)
    return record


def read_compatibility(store: Store, folder: str | None, spaces: tuple[str, str]) -> dict[str, Any] | None:
    """What was measured of new queries in the old index, where they find more than old ones; None where they do not.

    Args:
        folder: of bridges. spaces: the old and the new one.

    Raises:
        WrongSpace: the bridges are between others.
    """
    record = None if folder is None else read_json(store, f"{folder}/{RECORD}")
    if record is None:
        return None
    stated = (record["old"]["space"], record["new"]["space"])
    if stated != spaces:
        raise WrongSpace(
            f"queries from space {spaces[1][:16]} to {spaces[0][:16]} must have been measured to be compatible, but "
            f"{folder} is about queries from space {stated[1][:16]} to {stated[0][:16]}; measure them again"
        )
    figures: dict[str, Any] | None = record["compatibility"]
    return figures if figures is not None and figures["difference"]["low"] > 0 else None


def answers_through_bridge(bridges: Mapping[str, Any]) -> bool:
    """Whether the old index may be asked with the new model at once: through an adapter, or as it is."""
    asked = bridges["directions"].get(Direction.QUERIES_TO_OLD.value)
    return bool(bridges["skipped"] or (asked is not None and asked["stored"]))


def bridge_paths(name: str, direction: Direction) -> tuple[str, str]:
    """The adapter and its record, of the bridges with a fingerprint."""
    return f"bridges/{name}/{direction}.safetensors", f"bridges/{name}/{direction}.json"


def read_bridge(store: Store, name: str, direction: Direction) -> tuple[Adapter, BridgeRecord] | None:
    """An adapter that passed its gate, with its record; None where none did.

    Raises:
        WrongSpace: the adapter is not the one that the record is of.
        ValueError: either is damaged.
    """
    adapter_path, record_path = bridge_paths(name, direction)
    try:
        record = BridgeRecord.from_json(json.loads(store.read(record_path)))
        adapter = Adapter.from_bytes(store.read(adapter_path))
    except FileNotFoundError:
        return None
    record.refuse_other(adapter, record.source.space, record.target.space)
    return adapter, record


def sample_residuals(store: Store, name: str, sample: PairedSample) -> dict[str, float]:
    """How far the adapter of documents misses what the new model gives: document → the mean of its passages, of those
    that were drawn at random; nothing where no adapter passed."""
    found = read_bridge(store, name, Direction.DOCUMENTS_TO_NEW)
    if found is None:
        return {}
    old, new = (space.documents[: sample.drawn] for space in (sample.old, sample.new))
    missed: dict[str, list[float]] = {}
    for document, residual in zip(
        sample.document_ids, adapter_residuals(found[0].apply(old), new).tolist(), strict=False
    ):
        missed.setdefault(document, []).append(residual)
    return {document: fmean(values) for document, values in missed.items()}


def _record_path(name: str) -> str:
    return f"bridges/{name}/{RECORD}"


def _stored(store: Store, name: str, fitted: FittedBridge) -> dict[str, Any]:
    """Keep an adapter that passes; what is to be said of it."""
    record = fitted.record
    refused = _refusal(record)
    paths = bridge_paths(name, record.direction)
    if refused is None:
        store.write(paths[0], fitted.adapter.to_bytes())
        write_json(store, paths[1], record.to_json())
    return {
        "stored": refused is None,
        "files": list(paths) if refused is None else [],
        "refused": refused,
        "figures": fitted.figures,
        "record": record.to_json(),
    }


def _refusal(record: BridgeRecord) -> str | None:
    """Why an adapter may not be used; None where it may."""
    if record.length <= 0:
        return "what it maps points away from where it belongs"
    return None if record.verdict.passes else _missed(record.verdict)


def _missed(verdict: Verdict) -> str:
    words = []
    if verdict.recovery.low < verdict.least_recovery:
        words.append(
            f"it recovers {verdict.recovery.estimate:.3f} of the reference, at least {verdict.recovery.low:.3f} with "
            f"95 % confidence, where the gate asks for {verdict.least_recovery:g}"
        )
    if verdict.over_control.low <= 0:
        words.append(
            f"it finds {verdict.over_control.estimate:.3f} more than an adapter fitted to shuffled pairs, at least "
            f"{verdict.over_control.low:.3f}, which is not above 0"
        )
    return "; ".join(words)
