"""The Ray session of a run: a local one that listens on loopback alone, or the cluster that RAY_ADDRESS names."""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Local sessions: Ray's default of 30 % of memory is meant for machines that do nothing else; a fragment is about 100
# MB at most.
LOCAL_OBJECT_STORE_BYTES = 1_073_741_824
# Must be set before `import ray`: workers at nice 0 (15 starves them beside anything else), no call home, and (the name
# says Windows or macOS, the effect is general) addresses resolved to loopback, so that a local session opens no outside
# port. Ray ends workers that are idle for a second beyond one per CPU, actors included: on a small machine every
# fragment's writer then is a new process of 1.5 CPU-seconds.
LOCAL_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_num_workers_soft_limit": str(2 * (os.cpu_count() or 1) + 8),
}


class WorkFailed(Exception):
    """A task on a worker raised; the message names the work and the worker's error."""


class Session:
    """Starts Ray on first use, so that a run with nothing to do never pays for it; stops only what it started."""

    def __init__(self, object_store_bytes: int = LOCAL_OBJECT_STORE_BYTES) -> None:
        self._object_store_bytes = object_store_bytes
        self._owns = False
        self._started = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Connect to the cluster of RAY_ADDRESS, or start a local session."""
        if self._started:
            return
        address = os.environ.get("RAY_ADDRESS")
        if not address and "ray" not in sys.modules:
            os.environ.update({name: os.environ.get(name, value) for name, value in LOCAL_ENVIRONMENT.items()})
        import ray

        if not ray.is_initialized():
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if not address:
                options |= {"include_dashboard": False, "object_store_memory": self._object_store_bytes}
            with _quiet_stderr(), _own_sigterm():
                ray.init(address=address or "local", **options)
            self._owns = True
        _quiet_ray_data()
        self._started = True

    def close(self) -> None:
        if self._owns:
            import ray

            with _quiet_stderr():
                ray.shutdown()
        self._owns = self._started = False

    def resources(self) -> dict[str, float]:
        """CPUs, GPUs and memory of the whole cluster, by Ray's names."""
        self.start()
        import ray

        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return resources

    def stream(
        self, function: Callable[[T], R], tasks: Iterable[T], *, cpus: float = 1, gpus: float = 0
    ) -> Iterator[R]:
        """Results of `function` on each task, as they finish, in any order.

        At most two tasks per CPU are in flight, so that neither tasks nor results pile up in the driver. A worker
        that dies
        is replaced and its task is run again (outputs are named by what made them, so that a second writer writes the
        same).

        Raises:
            WorkFailed: a task raised. Penstock's own exceptions (those with a message for people) come through as
            they are.
        """
        self.start()
        import ray

        options: dict[str, Any] = {"num_cpus": cpus} | ({"num_gpus": gpus} if gpus else {})
        remote = ray.remote(**options, max_retries=5, retry_exceptions=False)(function)
        in_flight_limit = max(2, int(2 * self.resources().get("CPU", 1) / max(cpus, 0.5)))
        waiting: list[Any] = []
        for task in tasks:
            waiting.append(remote.remote(task))
            while len(waiting) >= in_flight_limit:
                yield _take_first(waiting)
        while waiting:
            yield _take_first(waiting)

    def warm(self, function: Callable[[T], R], workers: int) -> None:
        """Have so many worker processes, as far as there are CPUs, load what `function` needs, without waiting: while
        one process works by itself, the others get ready for what follows."""
        self.start()
        import ray

        remote = ray.remote(num_cpus=1)(_load)
        for _ in range(min(workers, int(self.resources().get("CPU", 1)))):
            remote.remote(function)

    def run(self, function: Callable[[T], R], task: T, *, cpus: float = 1, gpus: float = 0) -> R:
        """One task on a worker."""
        return next(iter(self.stream(function, [task], cpus=cpus, gpus=gpus)))


def _load(function: Callable[..., object]) -> None:
    """Nothing: to be given a function, a worker imports its module."""


def reraise(error: Exception) -> None:
    """Raise the error that a worker met instead of Ray's wrapping of it."""
    import ray.exceptions

    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and cause.cause is not None:
        cause = cause.cause
    if type(cause).__module__.startswith("penstock."):
        raise cause
    raise WorkFailed(f"a worker failed: {type(cause).__name__}: {cause}") from error


def _take_first(waiting: list[Any]) -> Any:  # noqa: ANN401
    import ray
    import ray.exceptions

    done, rest = ray.wait(waiting, num_returns=1)
    waiting[:] = rest
    try:
        return ray.get(done[0])
    except ray.exceptions.RayError as error:
        reraise(error)


def _quiet_ray_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # one fragment stays one block
    context.max_errored_blocks = 0
    context.raise_original_map_exception = True
    warnings.filterwarnings("ignore", module=r"ray\.data")  # advice on concurrency, repeated for each stage
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the process's own SIGTERM handler: Ray installs one that ends the process where it stands."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, own)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep the lines that Ray's C++ core prints about its own log level off the terminal; its errors still raise."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
