"""A data set prepared by TensorFlow Datasets, read through its `as_data_source`: no TensorFlow needed."""

from typing import Any

from data_pipelines import forms
from data_pipelines.errors import DataError, Reject
from data_pipelines.sources.base import Source


class TfdsSource(Source):
    """`path` is the folder of a prepared version (…/name/1.0.0) in ArrayRecord format, `split` its split."""

    def _open(self) -> tuple[list[str], list[int]]:
        import tensorflow_datasets as tfds  # here: it takes two seconds to import

        try:
            builder = tfds.builder_from_directory(self.options.path)
            decoders = {
                name: tfds.decode.SkipDecoding()
                for name, feature in builder.info.features.items()
                if isinstance(feature, tfds.features.Image)
            }
            self._records = builder.as_data_source(split=self.options.split, decoders=decoders)
            count = len(self._records)
        except Exception as error:  # the library raises many kinds
            line = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DataError(
                f"{self.options.path}: no prepared TFDS data set with split {self.options.split!r}: {line}"
            ) from error
        self._version = str(builder.info.version)
        return [f"{builder.info.name}-{self.options.split}"], [count]

    def _read(self, shard: int, record: int) -> dict[str, Any]:
        try:
            return self._records[record]
        except Exception as error:
            raise DataError(f"{self.options.path}: record {record} cannot be read: {error}") from error

    def fields(self, raw: dict[str, Any]) -> forms.Fields:
        """Lists of features and arrays as Python lists and numbers."""
        return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in raw.items()}

    def fetch(self, path: str) -> bytes:
        raise Reject("missing_image", f"{path} is not in the data set")

    def _identity(self) -> str:
        return self._version
