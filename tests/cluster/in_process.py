"""A session that runs tasks in this process, one after the other: what tasks do does not depend on where."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from penstock.cluster.session import Session

T = TypeVar("T")
R = TypeVar("R")


class InProcess(Session):
    def start(self) -> None: ...

    def close(self) -> None: ...

    def stream(
        self, function: Callable[[T], R], tasks: Iterable[T], *, cpus: float = 1, gpus: float = 0
    ) -> Iterator[R]:
        yield from map(function, tasks)
