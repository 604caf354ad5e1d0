"""What a backfill embeds at once, in order: slices of fragments with their most wanted documents, and fragments."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from penstock.cluster.jobs.priorities import PriorityJob, PriorityTask, UnitPriority, fragment_priorities
from penstock.cluster.session import Session
from penstock.cluster.storage import Store
from penstock.operators.backfill_order import fragment_order
from penstock.pipelines.canary_sample import sample_facts
from penstock.pipelines.planning import FragmentFacts, Resolved, embedded_of
from penstock.pipelines.progress import Reporter
from penstock.pipelines.records import read_json

FRAGMENTS_PER_TASK = 64


class OrderedBy(StrEnum):
    """What gave a unit its place: the first of these that is known of it."""

    TRAFFIC = "traffic"
    HUBS = "hubs"
    RESIDUAL = "residual"
    REST = "rest"


@dataclass(frozen=True)
class BackfillUnit:
    """A fragment, or a slice of one.

    Attributes:
        facts: of the fragment, or of the slice as one.
        of: the fragment.
        rows: passages that are embedded with it: those of a fragment without its slice.
        by: what ordered it.
        traffic, occurrences: by passage: how often it is asked for, and how many others it is near to, if it is a hub.
        residual: the mean distance of the adapter from the vectors of its documents in the sample, if there are any.
    """

    facts: FragmentFacts
    of: str
    rows: int
    by: OrderedBy
    traffic: float
    occurrences: float
    residual: float | None

    @property
    def is_slice(self) -> bool:
        return self.facts.passages != self.of

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BackfillUnit":
        return cls(**{**value, "facts": FragmentFacts(**value["facts"]), "by": OrderedBy(value["by"])})

    def shown(self) -> dict[str, Any]:
        """The record of an upgrade."""
        figures = {name: round(getattr(self, name), 6) for name in ("traffic", "occurrences")}
        residual = None if self.residual is None else round(self.residual, 6)
        named = {"fragment": self.of, "slice": self.facts.passages if self.is_slice else None}
        return {**named, "rows": self.rows, "by": self.by.value, **figures, "residual": residual}


def find_units(
    session: Session, reporter: Reporter, job: PriorityJob, facts: Sequence[FragmentFacts]
) -> list[BackfillUnit]:
    """The units of some fragments, the first to be embedded first; a slice before the rest of its fragment."""
    ordered = sorted((fact for fact in facts if fact.kept), key=lambda fact: fact.passages)
    names = [fact.passages for fact in ordered]
    excluding = frozenset(fact.passages for fact in ordered if fact.kept < fact.passages_in)
    tasks = [
        PriorityTask(job, group, excluding.intersection(group))
        for start in range(0, len(names), FRAGMENTS_PER_TASK)
        if (group := tuple(names[start : start + FRAGMENTS_PER_TASK]))
    ]
    found: dict[str, list[UnitPriority]] = {}
    with reporter.stage("priority", len(names), "fragments") as advance:
        for units in session.stream(fragment_priorities, tasks):
            for unit in units:
                found.setdefault(unit.fragment, []).append(unit)
            advance(len({unit.fragment for unit in units}))
    known = {fact.passages: fact for fact in ordered}
    return in_order([unit for name in names for unit in found[name]], known)


def in_order(priorities: Sequence[UnitPriority], facts: Mapping[str, FragmentFacts]) -> list[BackfillUnit]:
    """Units by what is known of them; equals by the names of fragments, a slice before its rest.

    Args:
        priorities: sorted by fragment, slices before rests. facts: of each fragment.
    """
    order = fragment_order(
        np.array([one.rows for one in priorities], np.int64),
        np.array([one.traffic for one in priorities]),
        np.array([one.occurrences for one in priorities]),
        np.array([np.nan if one.residual is None else one.residual for one in priorities]),
    )
    return [_unit(priorities[place], facts) for place in order.tolist()]


def order_path(folder: str) -> str:
    """Where the units of an upgrade are recorded."""
    return f"{folder}/order.json"


def recorded_slices(store: Store, folder: str, facts: Sequence[FragmentFacts]) -> list[BackfillUnit]:
    """The slices of some fragments in the order that was recorded last; none before it is found."""
    names = {fact.passages for fact in facts}
    units = map(BackfillUnit.from_json, (read_json(store, order_path(folder)) or {}).get("units", ()))
    return [unit for unit in units if unit.is_slice and unit.of in names]


def finished_of(
    new: Resolved, facts: Sequence[FragmentFacts], slices: Sequence[BackfillUnit], done: Collection[str]
) -> list[FragmentFacts]:
    """The fragments whose vectors are there, and of the others the slices whose vectors are: each passage once.

    Args:
        slices: of these fragments. done: the embeddings fragments that are there.
    """
    embedded = embedded_of(new, [*facts, *(one.facts for one in slices)])
    there = {passages for passages, made in embedded.embeddings.items() if made in done}
    again = {one.facts.passages for one in slices if one.of in there}
    return [fact for fact in embedded.facts if fact.passages in there - again]


def embedded_first(units: Sequence[BackfillUnit], done: frozenset[str]) -> list[BackfillUnit]:
    """The units with those in front of which the passages fragments are embedded already; without slices of fragments
    that are embedded as a whole."""
    useless = {unit.of for unit in units if unit.is_slice and unit.of in done and unit.facts.passages not in done}
    left = [
        replace(unit, rows=unit.facts.kept) if unit.of in useless else unit
        for unit in units
        if not (unit.is_slice and unit.of in useless)
    ]
    return sorted(left, key=lambda unit: unit.facts.passages not in done)


def fragments_of(units: Sequence[BackfillUnit]) -> list[str]:
    """The passages fragments that hold these units, each passage once: no slice of a fragment that is there."""
    whole = {unit.of for unit in units if not unit.is_slice}
    return [unit.facts.passages for unit in units if not unit.is_slice or unit.of not in whole]


def _unit(one: UnitPriority, facts: Mapping[str, FragmentFacts]) -> BackfillUnit:
    own = facts[one.fragment] if one.slice is None else sample_facts(one.slice)
    traffic, occurrences = one.traffic / one.rows, one.occurrences / one.rows
    return BackfillUnit(own, one.fragment, one.rows, _ordered_by(one), traffic, occurrences, one.residual)


def _ordered_by(one: UnitPriority) -> OrderedBy:
    if one.traffic > 0:
        return OrderedBy.TRAFFIC
    if one.occurrences > 0:
        return OrderedBy.HUBS
    return OrderedBy.REST if one.residual is None else OrderedBy.RESIDUAL
