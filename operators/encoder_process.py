"""An encoder in a process of its own, so that no text can take more with it than itself.

The parent sends token ids and receives vectors batch by batch. When the child dies (segmentation fault, abort, kill)
or does not answer for too long, the parent knows which batch it was at: a new child encodes the rows of that batch one
by one, and the row that brings it down again is a dead letter. Everything encoded until then is kept.

    python -m penstock.operators.encoder_process FD     (started by `IsolatedEncoder`; FD is the connection)
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from penstock.operators.acceleration import keep_freed_memory, release_freed_memory
from penstock.operators.encoding import Effort, Encoded, Encoder
from penstock.operators.late_chunking import Windows, passage_vectors, result_rows, result_zeros
from penstock.operators.models import read_module_stack
from penstock.operators.tokenizing import Fault, Tokenized

CRASH = "encoder_crash"
HANG = "encoder_hang"
RESTARTS_PER_CALL = 8
START_TIMEOUT_S = 900.0
PARENT_CHECK_S = 1.0


RowsDone = Callable[[np.ndarray, float], None]


class EncoderCrashed(Exception):
    """The encoder's process died again and again, or could not be started."""


@dataclass(frozen=True)
class ProcessOptions:
    """How the child runs; `timeout_s` is how long one batch may take before the child counts as hung."""

    threads: int | None = None
    device: str | None = None
    cache: Path | None = None
    timeout_s: float = 600.0


class IsolatedEncoder:
    """An EncoderWorker in a child process, with the same results.

    Raises:
        ModelMismatch and other errors of this package that EncoderWorker raises.
        EncoderCrashed: the child died RESTARTS_PER_CALL times in one call, or while starting; or a library raised in
            it, with its words.
    """

    def __init__(self, encoder: Encoder, folder: Path, options: ProcessOptions = ProcessOptions()) -> None:
        self.encoder = encoder
        self._folder, self._options = folder, options
        self._token_dimension = read_module_stack(folder).token_dimension
        self._child: _Child | None = None
        self.figures: dict[str, Any] = {}
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the child; returns when the model is loaded."""
        self._child = _Child(self._options)
        kind, *values = self._child.ask(("load", self.encoder, self._folder, self._options), START_TIMEOUT_S)
        if kind == "loaded":
            self.figures = values[0]
            return
        ending = self._child.ending(kind)
        self.close()
        if kind == "raised":
            raise values[0]
        raise EncoderCrashed(f"encoder ({self.encoder.model}): its process did not start: {ending}")

    @property
    def process_id(self) -> int:
        """The child's process id."""
        assert self._child is not None
        return self._child.process.pid

    def close(self) -> None:
        """Stop the child."""
        if self._child is not None:
            self._child.stop()
        self._child = None

    def encode_tokens(self, tokenized: Tokenized, texts: Sequence[str], on_rows: RowsDone | None = None) -> Encoded:
        """As EncoderWorker.encode_tokens; `on_rows` hears the rows of each batch and the seconds it took."""
        call = _Call(self.encoder, tokenized, texts, self._token_dimension)
        restarts = 0
        suspects = np.empty(0, np.int64)  # rows of the batch that a child died at: encoded one by one
        while True:
            outcome = self._converse(call, suspects, on_rows)
            if outcome == "":
                if len(suspects):
                    suspects = np.empty(0, np.int64)
                    continue
                break
            batch = call.rows_at_work
            if self._child is not None:
                self._child.stop()
            restarts += 1
            if restarts > RESTARTS_PER_CALL:
                raise EncoderCrashed(
                    f"encoder ({self.encoder.model}): its process ended {restarts} times within one fragment "
                    f"({outcome}); check the model, or lower embedding.batch_tokens"
                )
            if len(batch) == 1 and len(suspects):  # the second time, and alone
                reason = HANG if outcome.startswith("no answer") else CRASH
                call.faults[int(batch[0])] = Fault(reason, f"the encoder's process ended on this text: {outcome}")
                suspects = np.intersect1d(suspects, call.missing())
            else:
                suspects = batch
            self.start()
        call.effort.restarts = restarts
        return call.encoded()

    def encode_spans(self, windows: Windows, on_rows: RowsDone | None = None) -> Encoded:
        """As EncoderWorker.encode_spans; `on_rows` hears of windows."""
        sums = self.encode_tokens(windows, (), on_rows)
        return passage_vectors(windows, sums, self.encoder.dimension, self._project)

    def _project(self, means: np.ndarray) -> np.ndarray:
        assert self._child is not None
        kind, *values = self._child.ask(("project", means), self._options.timeout_s)
        if kind == "raised":
            raise values[0]
        if kind != "projected":
            ending = self._child.ending(kind)
            self.close()
            raise EncoderCrashed(f"encoder ({self.encoder.model}): its process ended after pooling: {ending}")
        vectors: np.ndarray = values[0]
        return vectors

    def _converse(self, call: "_Call", suspects: np.ndarray, on_rows: RowsDone | None) -> str:
        """Have the child encode what is missing (or the suspects alone); returns "" or how the child ended."""
        rows = suspects if len(suspects) else call.missing()
        assert self._child is not None
        call.rows_at_work = np.empty(0, np.int64)
        began = time.perf_counter()
        try:
            texts = () if self.figures["takes_token_ids"] else call.texts
            self._child.send(("encode", call.tokenized, texts, rows, bool(len(suspects))))
        except OSError:  # it died between two calls: no text is to blame
            return self._child.ending()
        while True:
            kind, *values = self._child.receive(self._options.timeout_s)
            match kind:
                case "at":
                    call.rows_at_work = values[0]
                case "vectors":
                    call.take(*values)
                    if on_rows:
                        on_rows(values[0], time.perf_counter() - began)
                    began = time.perf_counter()
                case "done":
                    call.finish(*values)
                    return ""
                case "raised":
                    raise values[0]
                case "timeout":
                    return f"no answer for {self._options.timeout_s:g} s"
                case _:
                    return self._child.ending()


class _Call:
    """What is known so far of one call: survives the child."""

    def __init__(
        self, encoder: Encoder, tokenized: Tokenized, texts: Sequence[str], token_dimension: int | None
    ) -> None:
        self.tokenized, self.texts = tokenized, texts
        self.name, self.result = result_zeros(tokenized, encoder.dimension, token_dimension)
        self.faults: dict[int, Fault] = dict(tokenized.faults)
        self.effort = Effort()
        self.rows_at_work = np.empty(0, np.int64)
        self._done = np.zeros(len(tokenized), bool)
        self._tokens, self._truncated = tokenized.within(encoder.max_tokens)

    def missing(self) -> np.ndarray:
        left = ~self._done
        left[list(self.faults)] = False
        return np.flatnonzero(left)

    def take(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        self.result[result_rows(self.tokenized, rows)] = vectors
        self._done[rows] = True
        self.rows_at_work = np.setdiff1d(self.rows_at_work, rows)

    def finish(self, faults: dict[int, Fault], effort: Effort) -> None:
        self.faults |= faults
        self.effort.add(effort)

    def encoded(self) -> Encoded:
        return Encoded({self.name: self.result}, self._tokens, self._truncated, self.faults, self.effort)


class _Child:
    """The child process and the connection to it."""

    def __init__(self, options: ProcessOptions) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        if options.threads:
            environment["OMP_NUM_THREADS"] = str(options.threads)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "penstock.operators.encoder_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())

    def send(self, message: tuple[Any, ...]) -> None:
        self._connection.send(message)

    def ask(self, message: tuple[Any, ...], timeout_s: float | None) -> tuple[Any, ...]:
        """Send, and the answer: as of `receive`."""
        try:
            self.send(message)
        except OSError:
            return ("ended",)
        return self.receive(timeout_s)

    def receive(self, timeout_s: float | None) -> tuple[Any, ...]:
        """The next message, ("timeout",) or ("ended",); without a limit, waits for one of the two others."""
        try:
            if not self._connection.poll(timeout_s):
                return ("timeout",)
            message: tuple[Any, ...] = self._connection.recv()
        except (EOFError, OSError):
            return ("ended",)
        return message

    def ending(self, kind: str = "ended") -> str:
        """How the process ended, or that it did not answer, for people."""
        if kind == "timeout":
            return "it did not answer in time"
        if kind == "raised":
            return "it raised"
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def stop(self) -> None:
        self._connection.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def call_in_process(function: Callable[..., Any], *arguments: object, options: ProcessOptions) -> Any:  # noqa: ANN401
    """The result of a function of this package, in a process that is set up like an encoder's and ends with it.

    Raises:
        EncoderCrashed: the process died, or a library raised in it, with its words.
        Errors of this package, as the function raises them.
    """
    child = _Child(options)
    try:
        kind, *values = child.ask(("call", function, arguments), None)
        if kind == "raised":
            raise values[0]
        if kind != "result":
            raise EncoderCrashed(f"{function.__name__}: its process gave no result: {child.ending(kind)}")
        return values[0]
    finally:
        child.stop()


# ---- the child


def _serve(connection: Connection) -> None:
    from penstock.operators.encoder_worker import DeviceLost, EncoderWorker

    worker: EncoderWorker | None = None
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return
        try:
            match message:
                case ("call", function, arguments):
                    connection.send(("result", function(*arguments)))
                case ("load", encoder, folder, options):
                    worker = EncoderWorker(encoder, folder, options.threads, options.device, options.cache)
                    connection.send(("loaded", worker.figures()))
                case ("project", means):
                    assert worker is not None
                    connection.send(("projected", worker.project(means)))
                case ("encode", tokenized, texts, rows, one_by_one):
                    assert worker is not None
                    encoded = worker.encode_tokens(
                        tokenized,
                        texts,
                        on_start=lambda batch: connection.send(("at", batch)),
                        on_done=lambda done, vectors: connection.send(("vectors", done, vectors)),
                        rows=rows,
                        one_by_one=one_by_one,
                    )
                    connection.send(("done", encoded.faults, encoded.effort))
                    release_freed_memory()
        except (BrokenPipeError, ConnectionError):  # the parent is gone
            return
        except DeviceLost as error:
            sys.stderr.write(f"{error}\n")
            os._exit(1)
        except Exception as error:
            connection.send(("raised", _sendable(error)))


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, however the parent ended and whatever a batch is doing."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def _sendable(error: Exception) -> Exception:
    """The error itself where it is one of ours, else its words: a library's may not survive the way."""
    if type(error).__module__.startswith("penstock."):
        return error
    return EncoderCrashed(f"{type(error).__name__}: {error}")


def main() -> None:
    """Serve the connection whose file descriptor is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    keep_freed_memory()
    _serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    from penstock.operators import encoder_process  # not as __main__, which to the parent is another module

    encoder_process.main()
