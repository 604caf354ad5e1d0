"""What a run shows while it works: bars on a terminal, a line per stage elsewhere, events as JSON lines for
machines."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

JSON_EVENT_INTERVAL_S = 1.0


class Advance(Protocol):
    """Tell that `amount` more is done, with a few words on it, and the figures in those words for machines."""

    def __call__(self, amount: float, detail: str = "", figures: Mapping[str, float] | None = None) -> None: ...


class Reporter(Protocol):
    """Where a run tells what it does."""

    def stage(self, name: str, total: float, unit: str) -> AbstractContextManager[Advance]: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class TerminalReporter:
    """A live bar for each stage, on standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn("[bold]{task.description:<11}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=total, unit=unit, detail="")

            def advance(amount: float, detail: str = "", figures: Mapping[str, float] | None = None) -> None:
                progress.update(task, advance=amount, detail=detail)

            yield advance

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False)


class LineReporter:
    """One line for each finished stage, on standard error."""

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        started, done = time.monotonic(), [0.0]

        def advance(amount: float, detail: str = "", figures: Mapping[str, float] | None = None) -> None:
            done[0] += amount

        yield advance
        self.note(f"{name}: {done[0]:,.0f} {unit} in {time.monotonic() - started:.1f} s")

    def note(self, text: str) -> None:
        sys.stderr.write(text + "\n")

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")


class JsonReporter:
    """Events as JSON lines on standard output: the same facts that people see."""

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        state = {"done": 0.0, "told": 0.0}
        self._event("stage_started", stage=name, total=total, unit=unit)

        def advance(amount: float, detail: str = "", figures: Mapping[str, float] | None = None) -> None:
            state["done"] += amount
            if time.monotonic() - state["told"] >= JSON_EVENT_INTERVAL_S:
                state["told"] = time.monotonic()
                more = {"figures": dict(figures)} if figures else {}
                self._event("progress", stage=name, done=state["done"], total=total, unit=unit, detail=detail, **more)

        started = time.monotonic()
        yield advance
        self._event(
            "stage_finished", stage=name, done=state["done"], unit=unit, seconds=round(time.monotonic() - started, 3)
        )

    def note(self, text: str) -> None:
        self._event("note", text=text)

    def warn(self, text: str) -> None:
        self._event("warning", text=text)

    def _event(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        sys.stdout.write(json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n")
        sys.stdout.flush()


class SilentReporter:
    """Tells nothing: for use from Python."""

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        yield lambda amount, detail="", figures=None: None

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass


def choose_reporter(json_lines: bool) -> Reporter:
    """The reporter for where the output goes."""
    if json_lines:
        return JsonReporter()
    console = Console(stderr=True)
    return TerminalReporter(console) if console.is_terminal else LineReporter()
