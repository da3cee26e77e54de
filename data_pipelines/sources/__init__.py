"""Where documents come from: one file per kind of storage, each with random access.

source = sources.open_source(Options("web", "webdataset", "gs://bucket/laion/*.tar"))
len(source), source.example(7)
"""

from data_pipelines import forms
from data_pipelines.errors import DataError
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.sources.base import Options, Source
from data_pipelines.sources.drawings import DrawingSource
from data_pipelines.sources.json_lines import JsonSource
from data_pipelines.sources.parquet import ParquetSource
from data_pipelines.sources.tfds import TfdsSource
from data_pipelines.sources.webdataset import WebDatasetSource

SOURCES: dict[str, type[Source]] = {
    "array_record": ArrayRecordSource,
    "drawings": DrawingSource,
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
    "tfds": TfdsSource,
    "json": JsonSource,
}

__all__ = ["SOURCES", "Options", "Source", "forms", "open_source"]


def open_source(options: Options) -> Source:
    """Opens a source. Raises DataError, naming source and file, if it cannot be used."""
    if options.kind not in SOURCES:
        raise DataError(
            f"source {options.name}: unknown kind {options.kind!r}; there are {', '.join(SOURCES)}"
        )
    return SOURCES[options.kind](options)
