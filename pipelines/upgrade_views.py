"""What people see of bridges and of the health of a space."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from penstock.pipelines.backfill_units import OrderedBy
from penstock.pipelines.backfilling import quality_text
from penstock.pipelines.reporting import records_table
from penstock.pipelines.upgrade_pages import (
    DIRECTIONS,
    FIGURES,
    PAIRINGS,
    SHOWN_FITS,
    best_first,
    figure_text,
    fit_words,
    likeness_words,
    same_fit,
)


def bridge_view(record: Mapping[str, Any]) -> RenderableType:
    """The pairings, the best fits of both directions, the verdicts, and where the adapters are."""
    bridges = record["bridges"]
    parts: list[RenderableType] = [_pairings(record), Text(likeness_words(record))]
    for direction, one in bridges["directions"].items():
        parts.append(_fits(direction, one))
        parts.append(Text(_verdict(direction, one), style="bold"))
    if bridges["skipped"]:
        parts.append(Text("No bridge is needed: the new model is compatible, declared and measured.", style="bold"))
    if not record["sample"]["queries"]["judged"]:
        parts.append(Text("No judgements: agreement with the old model is all that was measured."))
    return Group(*parts)


def upgrade_view(record: dict[str, Any]) -> RenderableType:
    """What an upgrade takes, what the models are worth, and what was done."""
    views: list[RenderableType] = [Text(f"{record['old']['model']} → {record['new']} (index {record['index']})")]
    if "plan" in record:
        views.append(_upgrade_plan(record["plan"]))
    if "canary" in record:
        views.append(bridge_view(record["canary"]))
    if "bridge" in record:
        views.append(Text(f"Search goes through version {record['bridge']['version']}, mixed of both models."))
    if "backfill" in record:
        views.append(_backfill_table(record["backfill"]["steps"]))
        views.append(Text(_order_words(record["backfill"]["order"])))
    if "flip" in record:
        views.append(_flip_text(record["flip"], record))
    return Group(*views)


def _upgrade_plan(plan: dict[str, Any]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    reused = ", ".join(name.replace("_", " ") for name, kept in plan["reused"].items() if kept) or "nothing"
    for name, value in (
        ("passages to embed", f"{plan['rows_to_embed']:,} of {plan['rows']:,}, {plan['tokens_to_embed']:,} tokens"),
        *_times(plan),
        ("reused", reused),
    ):
        table.add_row(name, value)
    return table


def _times(plan: dict[str, Any]) -> list[tuple[str, str]]:
    storage = f"{plan['overlap_bytes']:,} bytes"
    if plan["worker_hours"] is None:
        return [("takes", "not known, as all of the sample was embedded before"), ("storage meanwhile", storage)]
    pace = plan["tokens_per_s_per_worker"]
    return [
        ("measured", f"{pace:,.0f} tokens/s a worker" if pace else "nothing, as nothing is left"),
        (
            "takes",
            f"{plan['worker_hours']:,.2f} worker-hours of {plan['workers']} workers, until {plan['finishes']}, "
            f"cost {plan['cost']:,.2f}",
        ),
        ("storage meanwhile", f"{storage}, cost {plan['overlap_cost']:,.2f}"),
    ]


def _backfill_table(steps: list[dict[str, Any]]) -> RenderableType:
    rows = [
        {
            "embedded": f"{step['share']:.0%}",
            "passages": f"{step['rows']:,}",
            "encoded": f"{step['encoded']:,}",
            "quality": quality_text(step),
            "version": step["version"],
        }
        for step in steps
    ]
    return records_table(rows, list(rows[0]))


def _order_words(order: list[dict[str, Any]]) -> str:
    """How many passages each reason put where they were."""
    rows = {by: sum(one["rows"] for one in order if one["by"] == by) for by in OrderedBy}
    return "passages ordered by: " + ", ".join(f"{by} {count:,}" for by, count in rows.items() if count)


def _flip_text(flip: dict[str, Any], record: dict[str, Any]) -> Text:
    area = flip["area_under_quality"]
    mean = "" if area is None else f"; mean over the backfill {area:.4f}"
    words = (
        f"alias {flip['alias']} points to version {flip['version']} "
        f"({flip['rows']:,} passages, {quality_text(flip)}{mean}). "
        f"Now set embedding.model to {record['new']} in the file. `penstock rollback` returns to "
        f"{flip.get('previous') or record['old']['version']}."
    )
    return Text(words)


def health_view(record: Mapping[str, Any]) -> RenderableType:
    """The figures of a version's space, and what drifted."""
    versions = [record, *([record["against"]] if "against" in record else [])]
    rows = [
        {"figure": words} | {one["version"]: figure_text(one["report"]["health"][name]) for one in versions}
        for name, words in FIGURES.items()
    ]
    words = [
        f"{one['version']}: {one['sample_rows']:,} of {one['rows']:,} rows, {one['vectors_from']}" for one in versions
    ]
    if "against" in record:
        words.append(_drift_words(record))
    return Group(records_table(rows, ["figure", *(one["version"] for one in versions)]), Text("\n".join(words)))


def drift_words(record: Mapping[str, Any]) -> str:
    """The rules that are broken."""
    broken = [rule for rule in record["drift"] if rule["alarm"]]
    return "; ".join(
        f"{FIGURES[rule['figure']]} went from {rule['before']:.4g} to {rule['after']:.4g}, worse by "
        f"{rule['change']:.4g} where {rule['most']:g} is allowed"
        for rule in broken
    )


def _drift_words(record: Mapping[str, Any]) -> str:
    if record["why"] is not None:
        return f"not compared: {record['why']}"
    return f"alarm: {drift_words(record)}" if record["alarms"] else "no figure became worse than is allowed"


def _pairings(record: Mapping[str, Any]) -> RenderableType:
    names = ["recall", "ndcg"] if record["sample"]["queries"]["judged"] else ["agreement"]
    rows = [
        {"answers": words} | {name: _interval(record["pairings"][key][name]) for name in names}
        for key, words in PAIRINGS.items()
        if key in record["pairings"]
    ]
    return records_table(rows, ["answers", *names])


def _fits(direction: str, one: Mapping[str, Any]) -> RenderableType:
    record = one["record"]
    rows = [
        {
            DIRECTIONS[direction]: fit_words(fit),
            "held-out quality": _interval(fit["quality"]),
            "": "chosen" if same_fit(fit, record["chosen"]) else None,
        }
        for fit in best_first(record["candidates"])[:SHOWN_FITS]
    ]
    return records_table(rows, [DIRECTIONS[direction], "held-out quality", ""])


def _verdict(direction: str, one: Mapping[str, Any]) -> str:
    recovery = _interval(one["record"]["verdict"]["recovery"])
    if one["stored"]:
        return f"{DIRECTIONS[direction]}: passes, recovers {recovery}; kept as {one['files'][0]}"
    return f"{DIRECTIONS[direction]}: refused, {one['refused']}"


def _interval(interval: Mapping[str, float]) -> str:
    return f"{interval['estimate']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"
