"""Documents in records: what is written is read back, and anything else is a Reject."""

import pickle
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given, strategies as st

from data_pipelines import errors, records
from data_pipelines.drawing import Drawing
from data_pipelines.errors import DataError, Reject
from data_pipelines.schema import ROLES, Example, Image, Text

spans = st.one_of(
    st.builds(Text, st.text(), st.sampled_from(ROLES), st.booleans()),
    st.builds(Image, st.binary(max_size=40), st.none() | st.floats(0, 1e6)),
)
examples = st.builds(Example, st.text(), st.text(), st.lists(spans, max_size=6).map(tuple))


@given(examples, examples)
def test_records_hold_the_document(one, other):
    assert records.from_bytes(records.to_bytes(one)) == one
    assert (records.to_bytes(one) == records.to_bytes(other)) == (one == other)
    assert [*one.texts, *one.images] == sorted(one.spans, key=lambda span: isinstance(span, Image))


def test_equal_documents_have_equal_bytes_whatever_their_numbers_type():
    one, other = (Example("a", "s", (Image(b"x", timestamp), Text("t", "", True))) for timestamp in (2, 2.0))
    assert one == other and records.to_bytes(one) == records.to_bytes(other)


@pytest.mark.parametrize("read", [records.from_bytes, Drawing.from_bytes])
@given(st.binary(max_size=60))
def test_other_bytes_are_rejected(read: Callable[[bytes], object], record):
    with pytest.raises(Reject) as error:
        read(record)
    assert error.value.reason == "bad_record"


@pytest.mark.parametrize(
    "value",
    [
        [1, "s", []],
        ["a", "s", [["text", "t", "narrator", False]]],
        ["a", "s", [["image", "not bytes", None]]],
        ["a", "s", [["image", b"", float("nan")]]],
        ["a", "s", [["image", b"", float("-inf")]]],
        ["a", "s", [["image", b"", 1e307]]],
        ["a", "s", [["sound", b""]]],
        Drawing("s/c", "s", "c", b"", {"en": ("label", ())}).to_bytes(),
    ],
)
def test_records_of_another_shape_are_rejected(value):
    with pytest.raises(Reject, match="not an Example"):
        records.from_bytes(value if isinstance(value, bytes) else msgpack.packb(value))


def test_a_drawing_becomes_a_document_per_language():
    drawing = Drawing("s/c", "s", "c", b"png", {"en": ("cat", ("pet", "animal")), "de": ("Katze", ())})
    image, supervised = Image(b"png"), {"supervised": True}
    assert drawing.example("en").spans == (
        image,
        Text("en: "),
        Text("cat\n", **supervised),
        Text("pet, animal", **supervised),
    )
    assert drawing.example("de").spans == (image, Text("de: "), Text("Katze\n", **supervised))


def test_rejects_cross_process_borders_and_have_known_reasons():
    reject = pickle.loads(pickle.dumps(Reject("aspect", "640x2 pixels")))
    assert (reject.reason, str(reject)) == ("aspect", "640x2 pixels")
    assert isinstance(reject, DataError)
    with pytest.raises(KeyError, match="add it to REASONS"):
        Reject("ugly", "")
    assert all(name.isidentifier() and meaning for name, meaning in errors.REASONS.items())
