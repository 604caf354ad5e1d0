"""Identity: what makes two inputs, parameter sets or rows the same.

Every output is named by a fingerprint of what made it, so the canonical form must be exact: a value that has no single
canonical text (a float that is not finite, a set, an object) raises instead of being approximated.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

FINGERPRINT_HEX_DIGITS = 32  # 128 bits: collisions stay below 1e-18 for 10^10 outputs
TEXT_HASH_BYTES = 16
TEXT_HASH_TYPE = pa.binary(TEXT_HASH_BYTES)


def canonical_json(value: object) -> bytes:
    """The one UTF-8 JSON text of a value made of str, bool, int, finite float, None, lists, tuples and mappings of str.

    Raises:
        TypeError: for anything else, text that UTF-8 cannot hold included, named with its path inside the value.
    """
    return json.dumps(
        _plain(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def fingerprint(**parts: object) -> str:
    """128 bits of sha256 over the canonical JSON of the named parts, as 32 hexadecimal digits."""
    return hashlib.sha256(canonical_json(parts)).hexdigest()[:FINGERPRINT_HEX_DIGITS]


def fingerprint_set(members: Sequence[str]) -> str:
    """Fingerprint of a set of fingerprints: independent of their order, without building one large JSON text."""
    digest = hashlib.sha256()
    for member in sorted(members):
        digest.update(member.encode() + b"\n")
    return digest.hexdigest()[:FINGERPRINT_HEX_DIGITS]


def hash_texts(texts: Sequence[str]) -> pa.FixedSizeBinaryArray:
    """blake2b-128 of each text's UTF-8 bytes, as fixed_size_binary[16]."""
    digests = [hashlib.blake2b(text.encode(), digest_size=TEXT_HASH_BYTES).digest() for text in texts]
    return pa.array(digests, TEXT_HASH_TYPE)


def row_hashes(ids: Sequence[str]) -> np.ndarray:
    """blake2b-64 of each id as uint64 (N,): uniform and stable; orders rows and places them in shards."""
    digests = b"".join(hashlib.blake2b(row_id.encode(), digest_size=8).digest() for row_id in ids)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64)


def _plain(value: object, where: str) -> object:
    """The value in the types that the json module knows."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return _encodable(value, where)
        case float():
            if not math.isfinite(value):
                raise TypeError(f"{where} ({value}) is not a finite number: it has no canonical JSON; leave it out")
            return value
        case Mapping():
            return {_key(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, f"{where}[{position}]") for position, item in enumerate(value)]
        case _:
            raise TypeError(f"{where} is a {type(value).__name__}: turn it into plain data first")


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r}: keys of an identity are strings")
    return _encodable(key, where)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TypeError(f"{where} ({text!r}) holds half a surrogate pair: UTF-8 has no such character") from error
    return text
