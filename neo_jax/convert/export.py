"""From our parameters to a Hugging Face folder that works without us.

The folder holds the weights under the family's own names, its config.json, the tokenizer, and the PyTorch
modelling and processing files of `convert/hf` with the data modules they need, so that

    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).generate(...)

work in transformers. Families that transformers has itself (Fuyu, the plain language models) need no code.
"""

import dataclasses
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from data_pipelines.documents import DocumentRules
from data_pipelines.text import Tokenizer
from neo_jax import config as config_lib
from neo_jax.convert import files
from neo_jax.convert.families import FAMILIES
from neo_jax.convert.table import Row

HERE = pathlib.Path(__file__).parent
CODE = ("configuration_neo_jax", "modeling_neo_jax", "processing_neo_jax")
# What processing_neo_jax.py imports of data_pipelines, copied beside it.
DATA_CODE = (
    *("documents", "errors", "images", "layout", "positions"),
    *("resample", "resize", "schema", "template", "text"),
)
CLASSES = {
    "AutoConfig": "configuration_neo_jax.NeoJaxConfig",
    "AutoModelForImageTextToText": "modeling_neo_jax.NeoJaxForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_neo_jax.NeoJaxForConditionalGeneration",
    "AutoProcessor": "processing_neo_jax.NeoJaxProcessor",
}
IN_TRANSFORMERS = {"fuyu", "qwen3", "qwen2", "mistral", "llama"}
# Fields of config.data and of a stage that decide how a document looks.
DATA_FIELDS = (
    *("template", "special_tokens", "layout", "resize", "resize_canvas", "resize_grid", "number_images"),
    *("max_image_pixels", "max_image_bytes", "min_image_side", "max_aspect"),
)
STAGE_FIELDS = ("min_pixels", "max_pixels", "loss_reduction", "template", "layout")
# Special tokens that end an answer in one template or another.
ENDS = ("<|im_end|>", "<|endoftext|>", "</s>", "|ENDOFTEXT|")


def export(
    folder: pathlib.Path,
    config: FrozenConfigDict,
    stage: FrozenConfigDict,
    load: Callable[[str], np.ndarray],
    tokenizer: Tokenizer,
) -> None:
    """Writes a checkpoint as a folder of config.family; it appears whole or not at all.

    Args:
        folder: replaced if it exists.
        config: the run's; `stage` is the stage whose images and documents the model is used to.
        load: path -> our parameter, float32; each is asked for once. Those of objectives are left out.
    """
    family = FAMILIES[config.family]
    rows = list(family.table(config.model))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hf = family.hf_config(config.model, special_ids(tokenizer), stage.min_pixels, stage.max_pixels)
    fields = json.loads(config_lib.to_json(config))
    hf["neo_jax"] = {  # what `import` restores
        "name": config.name,
        "family": config.family,
        "model": fields["model"],
        "data": {name: fields["data"][name] for name in DATA_FIELDS},
        "stage": {name: stage[name] for name in STAGE_FIELDS},
    }
    if config.family not in IN_TRANSFORMERS:
        hf |= {"architectures": ["NeoJaxForConditionalGeneration"], "auto_map": CLASSES}
        hf["neo_jax"]["tensors"] = torch_tensors(config.model, rows)  # where modeling_neo_jax.py finds them
        write_code(partial, hf["model_type"])
        rules = document_rules(DocumentRules.from_config(config, stage, tokenizer))
        processor = {"auto_map": CLASSES, "processor_class": "NeoJaxProcessor", "rules": rules}
        write_json(partial / "processor_config.json", processor)
    for name, content in family.processor_files(config.model).items():
        write_json(partial / name, content)
    write_json(partial / "config.json", hf)
    write_tokenizer(partial, tokenizer)
    files.write_folder(partial, rows, load)
    (partial / "README.md").write_text(model_card(config, sum(math.prod(row.shape) for row in rows)))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def document_rules(rules: DocumentRules) -> dict[str, Any]:
    """The fields of the rules but the tokenizer, as JSON."""
    fields = {field.name: getattr(rules, field.name) for field in dataclasses.fields(rules)}
    del fields["tokenizer"]
    return fields | {name: dataclasses.asdict(fields[name]) for name in ("resize", "limits")}


def torch_tensors(model: FrozenConfigDict, rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Where modeling_neo_jax.py finds a weight: our path -> checkpoint name, shape, part of a fused tensor.

    In names of stacked parameters "{}" stands for the layer's number, which is `first` in the first layer.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for row in rows:
        for part, path in enumerate(row.paths):
            entry: dict[str, Any] = {"name": row.name, "shape": list(row.shape)}
            if path.startswith(("pre_buffer/", "layers/")):
                entry["name"], entry["first"] = _numbered(row, model.pre_buffer)
            elif row.at is not None:
                path = f"{path}/{row.at}"
            if len(row.paths) > 1:
                entry |= {"fused": row.kind, "part": part, "parts": len(row.paths)}
            assert tensors.setdefault(path, entry) == entry, f"layers differ in {path}"
    return tensors


def _numbered(row: Row, pre_buffer: int) -> tuple[str, int]:
    """A layer's tensor name with "{}" for its number, and the number of the stack's first layer.

    Most families count through both stacks, HoVLE numbers its own from 0.
    """
    assert row.at is not None, row
    for first in (pre_buffer, 0):
        name, found = re.subn(rf"(?<=\.){row.at + first}(?=\.)", "{}", row.name)
        if found == 1:
            return name, first
    raise AssertionError(f"{row.name}: no number of layer {row.at}")


def write_code(folder: pathlib.Path, model_type: str) -> None:
    """Copies the modelling and processing files, and what they import of data_pipelines, into the folder."""
    for name in CODE:
        code = (HERE / "hf" / f"{name}.py").read_text()
        # transformers warns where a configuration class and config.json name different model types.
        code = code.replace('model_type = "neo_jax"', f'model_type = "{model_type}"')
        (folder / f"{name}.py").write_text(code)
    data = HERE.parent.parent / "data_pipelines"
    for name in DATA_CODE:
        code = (data / f"{name}.py").read_text()
        code = re.sub(r"^from data_pipelines import", "from . import", code, flags=re.MULTILINE)
        code = re.sub(r"^from data_pipelines\.(\w+) import", r"from .\1 import", code, flags=re.MULTILINE)
        (folder / f"{name}.py").write_text(code)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {name: id_ for id_, name in tokenizer.special_tokens.items()}


def write_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json with what transformers wants to know about it, and where generation ends."""
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    ids = special_ids(tokenizer)
    ends = [name for name in ENDS if name in ids]
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    generation: dict[str, Any] = {"do_sample": False}
    if ends:
        tokenizer_config |= {"eos_token": ends[0], "pad_token": ends[-1]}
        generation |= {"eos_token_id": [ids[name] for name in ends], "pad_token_id": ids[ends[-1]]}
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "generation_config.json", generation)


def model_card(config: FrozenConfigDict, num_parameters: int) -> str:
    """README.md of the folder."""
    code = config.family not in IN_TRANSFORMERS
    trust = ", trust_remote_code=True" if code else ""
    needs = "torch and pillow" if code else "torch and torchvision"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {config.name}

A native vision-language model (one transformer over image patches and words, no vision encoder) trained with
neo_jax: family `{config.family}`, {num_parameters:,} parameters.

It needs transformers >= 5.24, {needs}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER{trust})
model = AutoModelForImageTextToText.from_pretrained(FOLDER{trust})
inputs = processor(text="<image>What is this?", images=[PIL_IMAGE], return_tensors="pt")
new = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(new, skip_special_tokens=True)[0])
```
"""


def write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
