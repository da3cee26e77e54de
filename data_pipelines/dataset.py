"""The data of a config, opened: its sources by split, its tokenizer, and hashes that say which data it is.

Two ways to name data, which end in the same: `data.path` is a folder that data_pipelines/build wrote, with
sources, splits and tokenizer in its manifest; `data.sources` lists sources of any kind where they lie.
"""

import dataclasses
from pathlib import Path
from typing import Any

from data_pipelines import build, text
from data_pipelines.errors import DataError
from data_pipelines.sources import Options, Source, open_source


@dataclasses.dataclass(frozen=True)
class Data:
    """Opened data.

    Attributes:
        tokenizer: of all sources.
        sources: split -> name -> source.
        source_names: of all of them, in the order of `source_ids`.
        max_rejected: name -> the largest share of its records that may be rejected.
        templates: name -> its template, "" = the config's.
        data_hash: identifies tokenizer and stored records.
        manifest: of the folder `data.path`; None with `data.sources`.
    """

    tokenizer: text.Tokenizer
    sources: dict[str, dict[str, Source]]
    source_names: list[str]
    max_rejected: dict[str, float]
    templates: dict[str, str]
    data_hash: str
    manifest: dict[str, Any] | None

    @property
    def packed(self) -> dict[str, Any] | None:
        """The manifest, if the folder holds packed rows."""
        return self.manifest if self.manifest is not None and self.manifest.get("form") == "rows" else None

    def split(self, name: str) -> dict[str, Source]:
        """The sources of a split, by name. Raises DataError if there is no such split."""
        if name not in self.sources:
            raise DataError(f"the data has no split {name!r}; splits are {', '.join(sorted(self.sources))}")
        return self.sources[name]


def open_data(config: Any) -> Data:
    """Opens the data of a config.

    Args:
        config: the `data` part of a config.

    Raises:
        DataError: something is missing, damaged or not what it was built as; the message names the file.
    """
    return _open_sources(config) if len(config.sources) else _open_folder(config)


def _open_folder(config: Any) -> Data:
    manifest = build.ensure(config)
    folder = Path(config.path)
    kind = "drawings" if manifest.get("parameters", {}).get("recipe") == "quickstart" else "array_record"
    sources: dict[str, dict[str, Source]] = {}
    for split, name in dict.fromkeys((shard["split"], shard["source"]) for shard in manifest["shards"]):
        pattern = f"{folder}/{split}/{name}-[0-9][0-9][0-9][0-9][0-9]-of-*.array_record"
        options = Options(name, kind, pattern, split=split, index_path=config.index_path)
        sources.setdefault(split, {})[name] = open_source(options)
    names = manifest["sources"]
    return Data(
        text.Tokenizer(folder / manifest["tokenizer"]["file"], config.special_tokens),
        sources,
        names,
        dict.fromkeys(names, config.max_rejected),
        dict.fromkeys(names, ""),
        manifest["data_hash"],
        manifest,
    )


def _open_sources(config: Any) -> Data:
    sources: dict[str, dict[str, Source]] = {}
    names = list(config.sources)
    for name, fields in config.sources.items():
        options = Options(
            name,
            fields.kind,
            fields.path,
            split=fields.split,
            form=fields.form,
            image_fields=tuple(fields.image_fields),
            text_fields=tuple(fields.text_fields),
            image_root=fields.image_root,
            index_path=config.index_path,
        )
        sources.setdefault(fields.split, {})[name] = open_source(options)
    tokenizer = Path(config.tokenizer)
    if not tokenizer.is_file():
        raise DataError(f"config.data.tokenizer={str(tokenizer)!r}: no such file; name a tokenizer.json")
    identities = {name: source.identity for split in sources.values() for name, source in split.items()}
    return Data(
        text.Tokenizer(tokenizer, config.special_tokens),
        sources,
        names,
        {name: fields.max_rejected for name, fields in config.sources.items()},
        {name: fields.template for name, fields in config.sources.items()},
        build.json_hash([identities, build.shards.describe(tokenizer)["sha256"]]),
        None,
    )
