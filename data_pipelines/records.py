"""Examples as records: the bytes that shards hold."""

from typing import Any

import msgpack

from data_pipelines.errors import Reject
from data_pipelines.schema import ROLES, Example, Image, Span, Text


def to_bytes(example: Example) -> bytes:
    """Serialises to msgpack; equal examples give equal bytes."""
    return msgpack.packb([example.id, example.source, [_span_fields(span) for span in example.spans]])


def from_bytes(record: bytes) -> Example:
    """Reads a record back. Raises Reject("bad_record") if it is no Example."""
    try:
        id_, source, spans = msgpack.unpackb(record)
        if not (isinstance(id_, str) and isinstance(source, str) and isinstance(spans, list)):
            raise TypeError("id, source or spans has another type")
        return Example(id_, source, tuple(map(_span_from_fields, spans)))
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise Reject("bad_record", f"{len(record)} bytes that are not an Example: {error}") from error


def _span_fields(span: Span) -> list[Any]:
    if isinstance(span, Text):
        return ["text", span.text, span.role, bool(span.supervised)]
    return ["image", bytes(span.data), None if span.timestamp is None else span.timestamp + 0.0]  # no -0.0


def _span_from_fields(fields: list[Any]) -> Span:
    match fields:
        case ["text", str(text), str(role), bool(supervised)] if role in ROLES:
            return Text(text, role, supervised)
        case ["image", bytes(data), None | float() as timestamp]:
            return Image(data, timestamp)
    raise ValueError(f"a span is neither text nor image: {str(fields)[:80]}")
