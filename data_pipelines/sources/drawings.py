"""The quickstart's ArrayRecord shards: a record is a `Drawing`."""

from data_pipelines.drawing import Drawing
from data_pipelines.schema import Example
from data_pipelines.sources.array_record import ArrayRecordSource


class DrawingSource(ArrayRecordSource):
    """As any other source, a drawing is a caption in its first language; see also makers.DrawingMaker."""

    def to_example(self, raw: bytes, id_: str) -> Example:
        drawing = Drawing.from_bytes(raw)
        return drawing.example(min(drawing.captions))
