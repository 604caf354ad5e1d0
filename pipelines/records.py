"""Records: small JSON objects in the store."""

import json
from typing import Any

from penstock.cluster.storage import Store


def read_json(store: Store, path: str) -> dict[str, Any] | None:
    """A record; None where there is none."""
    try:
        record: dict[str, Any] = json.loads(store.read(path))
    except FileNotFoundError:
        return None
    return record


def write_json(store: Store, path: str, record: dict[str, Any]) -> None:
    """Write a record, or replace the one that is there."""
    store.write(path, json.dumps(record, indent=1, sort_keys=True).encode())
