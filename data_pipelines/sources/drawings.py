"""The quickstart's ArrayRecord shards: a record is a `Drawing`."""

import dataclasses

from data_pipelines.drawing import Drawing
from data_pipelines.schema import Example
from data_pipelines.sources.array_record import ArrayRecordSource


class DrawingSource(ArrayRecordSource):
    """As any other source, a drawing is a caption in its first language, or as form "text" the words of it
    alone; see also makers.DrawingMaker.
    """

    def to_example(self, raw: bytes, id_: str) -> Example:
        drawing = Drawing.from_bytes(raw)
        example = drawing.example(min(drawing.captions))
        return dataclasses.replace(example, spans=example.texts) if self.options.form == "text" else example
