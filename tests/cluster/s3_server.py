"""An S3 server for tests: moto behind a lock, with faults on demand. It runs in its own process.

moto alone checks a precondition and writes in two steps; the lock makes a conditional write atomic, as on a real store.
Two paths control it: PUT /__faults with a JSON list of rules, GET /__log with what was asked and what was done to it.

A rule is {"do": action, "method": "PUT", "match": regex over path?query, "nth": 1, "count": 1}: it applies to the nth
matching request and the count-1 after it. Actions:
    "500", "503", "409", "403"  an error reply, the request is not applied
    "drop"                      the connection is closed, the request is not applied
    "lost_reply"                the request is applied, then the connection is closed
    "slow:5"                    applied after 5 seconds
    "ignore_preconditions"      applied as if it had no If-None-Match header
"""

import argparse
import io
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NoReturn
from wsgiref.handlers import format_date_time

import moto.s3.models
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

CODES = {"500": "InternalError", "503": "SlowDown", "409": "ConditionalRequestConflict", "403": "AccessDenied"}

Environment = dict[str, Any]
StartResponse = Callable[..., Any]


class ConnectionDropped(ConnectionError):
    """Ends the request without a reply; werkzeug would answer an error of another kind with a 500."""


@dataclass
class Rule:
    """One fault, and how many requests have matched it."""

    do: str
    method: str | None = None
    match: str = "."
    nth: int = 1
    count: int = 1
    seen: int = 0

    def applies(self, method: str, target: str) -> bool:
        """Count a request; whether the fault is due for it."""
        if self.method not in (None, method) or not re.search(self.match, target):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.count


class FaultyS3:
    """The WSGI application."""

    def __init__(self, clock_offset_s: float) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.clock_offset_s = clock_offset_s
        self.applying = threading.Lock()
        self.deciding = threading.Lock()
        self.rules: list[Rule] = []
        self.log: list[dict[str, str | None]] = []

    def __call__(self, environment: Environment, start: StartResponse) -> Iterable[bytes]:
        match environment["PATH_INFO"]:
            case "/__faults":
                self.rules = [Rule(**rule) for rule in json.loads(_read_body(environment) or b"[]")]
                start("200 OK", [])
                return [b""]
            case "/__log":
                start("200 OK", [("Content-Type", "application/json")])
                return [json.dumps(self.log).encode()]
            case _:
                return self.serve(environment, start)

    def serve(self, environment: Environment, start: StartResponse) -> Iterable[bytes]:
        """Do to one S3 request what the rules say."""
        action = self.decide(environment)
        if action == "drop":
            _drop_connection(environment)
        # the body is read outside the lock: a torn upload neither reaches the store nor holds the lock
        environment["wsgi.input"] = io.BytesIO(_read_body(environment))
        if action in CODES:
            start(f"{action} Injected", [("Content-Type", "application/xml")])
            body = f"<Error><Code>{CODES[action]}</Code><Message>injected</Message></Error>"
            return [b"" if environment["REQUEST_METHOD"] == "HEAD" else body.encode()]
        if action and action.startswith("slow:"):
            time.sleep(float(action.removeprefix("slow:")))
        if action == "ignore_preconditions":
            environment.pop("HTTP_IF_NONE_MATCH", None)
        with self.applying:
            reply = [b"".join(self.moto(environment, self.dated(start)))]
        if action == "lost_reply":
            _drop_connection(environment)
        return reply

    def decide(self, environment: Environment) -> str | None:
        """The action of the first rule that is due; the request and its action go to the log."""
        method, target = environment["REQUEST_METHOD"], f"{environment['PATH_INFO']}?{environment['QUERY_STRING']}"
        with self.deciding:
            action = next((rule.do for rule in self.rules if rule.applies(method, target)), None)
            self.log.append({"method": method, "target": target, "action": action})
        return action

    def dated(self, start: StartResponse) -> StartResponse:
        """`start`, with a Date header on this server's clock."""

        def start_dated(status: str, headers: list[tuple[str, str]], *rest: object) -> object:
            kept = [(name, value) for name, value in headers if name.lower() != "date"]
            return start(status, [*kept, ("Date", format_date_time(time.time() + self.clock_offset_s))], *rest)

        return start_dated


def _drop_connection(environment: Environment) -> NoReturn:
    environment["werkzeug.socket"].shutdown(socket.SHUT_RDWR)  # else it is kept open for the next request
    raise ConnectionDropped


def _read_body(environment: Environment) -> bytes:
    length = int(environment.get("CONTENT_LENGTH") or 0)
    body: bytes = environment["wsgi.input"].read(length)
    if len(body) < length:
        raise ConnectionDropped
    return body


def shift_modification_times(clock_offset_s: float) -> None:
    """Let moto date objects by a clock that is off."""
    present = moto.s3.models.utcnow

    def shifted() -> datetime:
        return present() + timedelta(seconds=clock_offset_s)

    moto.s3.models.utcnow = shifted


def main() -> None:
    """Serve on a free port, which is printed once the server listens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clock-offset-s", type=float, default=0.0)
    arguments = parser.parse_args()
    shift_modification_times(arguments.clock_offset_s)
    server = make_server("127.0.0.1", 0, FaultyS3(arguments.clock_offset_s), threaded=True)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
