"""What makes a document the same: all of its passages, by id and by text."""

import hashlib

import numpy as np
import pyarrow as pa

from penstock.operators.identity import TEXT_HASH_BYTES, TEXT_HASH_TYPE

_ROW_BYTES = 8


def document_hashes(
    document: np.ndarray, row: np.ndarray, text: pa.ChunkedArray
) -> tuple[np.ndarray, pa.FixedSizeBinaryArray]:
    """One hash of all passages of each document: it changes when one comes, goes or has another text.

    Args:
        document: uint64 (n,), the document of each passage, in any order; `row` uint64 (n,) is its own hash and `text`
            fixed_size_binary[16] (n,) that of its text.

    Returns:
        uint64 (d,) documents, ascending, and fixed_size_binary[16] (d,), blake2b-128 of the row hashes (little endian,
        ascending) and then the text hashes of the passages of each.
    """
    order = np.lexsort((row, document))
    own, first, count = np.unique(document[order], return_index=True, return_counts=True)
    rows, texts = row[order].astype("<u8").tobytes(), text.take(pa.array(order)).to_pylist()
    digests = [
        hashlib.blake2b(
            rows[_ROW_BYTES * start : _ROW_BYTES * end] + b"".join(texts[start:end]), digest_size=TEXT_HASH_BYTES
        ).digest()
        for start, end in zip(first, first + count, strict=True)
    ]
    return own, pa.array(digests, TEXT_HASH_TYPE)
