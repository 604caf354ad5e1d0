"""Named arrays with a JSON record as bytes: safetensors, which holds no code, and equal bytes for equal content."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from penstock.operators.identity import canonical_json

RECORD_KEY = "penstock"  # one key for all of the record: safetensors does not promise an order of several
LENGTH_BYTES = 8  # a safetensors file begins with the length of its JSON header, a little endian uint64
VERSION = 1


def pack(kind: str, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays and a record of JSON values; equal content gives equal bytes."""
    text = canonical_json({"kind": kind, "version": VERSION, "record": record}).decode()
    packed: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {RECORD_KEY: text})
    return packed


def unpack(kind: str, data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record and the arrays of what `pack` wrote for this kind; the arrays are read-only or copies.

    Raises:
        ValueError: the bytes are damaged, or hold something else.
    """
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise ValueError(
            f"{kind} ({len(data)} bytes) must be a safetensors file, got {error}; compare its sha256 with the manifest "
            "and fetch it again"
        ) from error
    header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")])
    content = json.loads(header.get("__metadata__", {}).get(RECORD_KEY, "{}"))
    found = (content.get("kind"), content.get("version"))
    if found != (kind, VERSION):
        raise ValueError(
            f"safetensors file ({len(data)} bytes) must be of kind {kind}, version {VERSION}, got kind {found[0]}, "
            f"version {found[1]}; give the file that the manifest names"
        )
    return content["record"], arrays
