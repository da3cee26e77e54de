"""A recipe: what a build does to its input, as plain values that are recorded in the manifest and hashed."""

import dataclasses
from typing import Any

from data_pipelines.build.dedup import Rule
from data_pipelines.build.filters import Stage
from data_pipelines.build.items import as_json
from data_pipelines.build.outputs import Examples, Form
from data_pipelines.errors import DataError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stages for each record, then dedup rules over all, then a global shuffle into shards.

    Fields:
        name: of the recipe, in the manifest.
        stages: filters, in order; see filters.py.
        dedup: rules; see dedup.py. A record that an earlier one makes superfluous under any rule is left out,
            even if that earlier one is itself left out under another rule.
        output: `Examples()`, or `Rows(...)` for rows packed now.
        tokenizer: path of a tokenizer.json, or the vocabulary size of a byte-level BPE that is trained on
            `tokenizer_documents` of the kept documents.
        tokenizer_documents: how many, drawn like everything else by hash.
        num_shards: output shards per split (and source, for `Examples`). A shard is sorted in memory: choose
            so many that each stays below a gigabyte; 0 = one per 512 MB of input.
        holdout: share of documents that goes to the split "val"; the others are "train".
        seed: of shuffle and holdout.
        version: raise it when the same fields would give other bytes.
    """

    name: str
    stages: tuple[Stage, ...] = ()
    dedup: tuple[Rule, ...] = ()
    output: Form = Examples()  # noqa: RUF009, a frozen value
    tokenizer: str | int = 2048
    tokenizer_documents: int = 20_000
    num_shards: int = 0
    holdout: float = 0.0
    seed: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        if self.num_shards < 0 or not 0 <= self.holdout < 1:
            raise DataError(f"recipe {self.name}: num_shards >= 0 and 0 <= holdout < 1 must hold")

    def describe(self) -> dict[str, Any]:
        """The recipe as JSON values: fields, with the class's name for each stage and rule."""
        return as_json(self)

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val") if self.holdout else ("train",)
