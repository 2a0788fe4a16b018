"""A digest of a table's content: equal rows in equal order give it, however they are cut into batches.

Each leaf of each column (values, lengths, NULLs) is a byte stream of its own under SHA-256, fed batch by
batch; the table's digest is the SHA-256 of its schema, its row count and its leaves' digests.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class ContentDigest:
    """Feed batches of one schema with ``update``; read ``hexdigest``.

    >>> def digest(*batches):
    ...     content = ContentDigest(pa.schema([("x", pa.list_(pa.int32()))]))
    ...     for rows in batches:
    ...         content.update(pa.table({"x": pa.array(rows, pa.list_(pa.int32()))}))
    ...     return content.hexdigest()
    >>> digest([[1], [2, 3]]) == digest([[1]], [[2, 3]])
    True
    >>> digest([[1], [2, 3]]) == digest([[1, 2], [3]])
    False
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._leaves: dict[str, hashlib._Hash] = {}
        self.rows = 0

    def update(self, batch: pa.Table) -> None:
        """Add the rows of ``batch``, which has the schema's columns."""
        self.rows += batch.num_rows
        for name in self._schema.names:
            for chunk in batch.column(name).chunks:
                self._feed(name, chunk)

    def hexdigest(self) -> str:
        """SHA-256 in hexadecimal of everything fed so far."""
        total = hashlib.sha256(f"{self.rows}\n".encode())
        for field in self._schema:
            total.update(f"{field.name}\t{field.type}\n".encode())
        for path in sorted(self._leaves):
            total.update(f"{path}\t{self._leaves[path].hexdigest()}\n".encode())
        return total.hexdigest()

    def _feed(self, path: str, values: pa.Array) -> None:
        self._put(f"{path}?", values.is_valid())
        kind = values.type
        if pa.types.is_list(kind):
            self._put(f"{path}#", pc.fill_null(pc.list_value_length(values), 0))
            self._feed(f"{path}[]", values.flatten())
        elif pa.types.is_struct(kind):
            for index, child in enumerate(values.flatten()):
                self._feed(f"{path}.{kind.field(index).name}", child)
        elif pa.types.is_string(kind) or pa.types.is_binary(kind):
            filled = pc.fill_null(values, pa.scalar("").cast(kind)) if values.null_count else values
            self._put(f"{path}#", pc.binary_length(filled))
            self._leaf(path).update(_characters(filled))
        else:
            zero = pa.scalar(0).cast(kind)
            self._put(path, pc.fill_null(values, zero) if values.null_count else values)

    def _put(self, path: str, values: pa.Array) -> None:
        array = np.ascontiguousarray(values.to_numpy(zero_copy_only=False))
        self._leaf(path).update(array.view(np.uint8).data)

    def _leaf(self, path: str) -> "hashlib._Hash":
        return self._leaves.setdefault(path, hashlib.sha256())


def _characters(values: pa.Array) -> memoryview:
    """The bytes of all texts of an array without NULL, one after the other."""
    _, offsets, data = values.buffers()
    if data is None or len(values) == 0:
        return memoryview(b"")
    edges = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    return memoryview(data)[int(edges[0]) : int(edges[-1])]
