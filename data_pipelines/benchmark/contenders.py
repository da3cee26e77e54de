"""Ways to get from WebDataset tars to what a model takes; each is a pass over all photos, once.

ours          records -> documents -> rows packed to two budgets, patches as uint8
torch         torch DataLoader + webdataset, one worker: PIL decode and resize, the same tokenizer
energon       the same decode, resize and tokenizer under Megatron-Energon's loader, where it is installed
bare_pillow   nothing but decoding with libjpeg-turbo and resizing with Pillow, files in memory
bare_simd     the same with a SIMD resizer, which rounds otherwise than Pillow: the fastest bare loop

All decode every photo and resize it by the same rule with the same filter; all but the bare loops tokenise
the captions too.
"""

import dataclasses
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from data_pipelines import pack, resample, sources
from data_pipelines.benchmark.packing import pack_rows
from data_pipelines.documents import DocumentRules
from data_pipelines.resize import RESIZES, Resize
from data_pipelines.schema import Document
from data_pipelines.text import Tokenizer

TORCH_BATCH = 16
WINDOW = 400  # documents that are packed together


@dataclasses.dataclass(frozen=True)
class Job:
    """What every contender does."""

    folder: Path  # of photos.folder
    row_tokens: int
    row_patches: int
    to: Resize

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def tars(self) -> list[str]:
        return sorted(map(str, self.folder.glob("*.tar")))

    def source(self) -> sources.Source:
        options = sources.Options(
            "photos", "webdataset", str(self.folder), index_path=str(self.folder / "index")
        )
        return sources.open_source(options)

    def rules(self) -> DocumentRules:
        return DocumentRules(Tokenizer(self.tokenizer_file), self.to, template="plain")


@dataclasses.dataclass(frozen=True)
class Done:
    """What a pass got through."""

    images: int
    tokens: int = 0  # of captions and pictures together
    rows: int = 0


def ours(job: Job) -> Callable[[], Done]:
    """The library's own way, in one thread."""
    source, rules = job.source(), job.rules()

    def run() -> Done:
        images = tokens = rows = 0
        window: list[Document] = []
        for index in range(len(source)):
            window.append(rules.document(source.example(index)))
            if len(window) < WINDOW and index + 1 < len(source):
                continue
            for row in pack_rows(window, job.row_tokens, job.row_patches):
                pack.stack([row], 1, job.row_tokens, job.row_patches, job.to.side**2 * 3)
                rows += 1
                images += sum(int(document.image_ids.max(initial=0)) for document in row)
                tokens += sum(len(document.tokens) for document in row)
            window = []
        return Done(images, tokens, rows)

    return run


class _ToArrays:
    """One webdataset sample -> pixels and token ids, as a PyTorch data set would make them."""

    def __init__(self, job: Job):
        self._to = job.to
        self._tokenizer = Tokenizer(job.tokenizer_file)

    def __call__(self, sample: dict[str, Any]) -> tuple[Any, Any]:
        import torch

        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        plan = self._to.plan(image.height, image.width)
        pixels = np.array(image.resize((plan.width, plan.height), RESIZES[self._to.rule].filter))
        ids = self._tokenizer.encode(sample["txt"].decode())
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.tensor(ids)

    def count(self, pixels: Any, ids: Any) -> int:
        """Tokens of one sample, those of its picture included."""
        return pixels.shape[1] * pixels.shape[2] // self._to.side**2 + len(ids)


def torch_webdataset(job: Job) -> Callable[[], Done]:
    """torch DataLoader over webdataset with one worker, which lives on between passes."""
    import torch
    import webdataset

    torch.set_num_threads(1)
    to_arrays = _ToArrays(job)
    dataset = webdataset.WebDataset(job.tars, shardshuffle=False, empty_check=False).map(to_arrays)
    loader = torch.utils.data.DataLoader(
        dataset, TORCH_BATCH, num_workers=1, collate_fn=list, persistent_workers=True
    )

    def run() -> Done:
        images = tokens = 0
        for batch in loader:
            images += len(batch)
            tokens += sum(to_arrays.count(pixels, ids) for pixels, ids in batch)
        return Done(images, tokens)

    return run


def energon(job: Job) -> Callable[[], Done]:
    """Megatron-Energon's loader with one worker; the tars are indexed once."""
    import torch
    from megatron import energon

    torch.set_num_threads(1)
    to_arrays = _ToArrays(job)
    if not (job.folder / ".nv-meta" / "dataset.yaml").exists():
        tars = [Path(tar).name for tar in job.tars]
        energon.BaseWebdatasetFactory.prepare_dataset(
            job.folder, tars, split_parts_ratio=[("train", 1.0)], workers=1
        )
        (job.folder / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        )

    @energon.stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        pixels, ids = to_arrays(sample)
        return {"__key__": sample["__key__"], "pixels": pixels, "ids": ids}

    class Encoder(energon.TaskEncoder):
        decoder = None
        cookers = (energon.Cooker(cook),)

        def batch(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return samples

    dataset = energon.get_train_dataset(
        job.folder,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=1),
        batch_size=TORCH_BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
        repeat=False,
    )
    loader = energon.get_loader(dataset)

    def run() -> Done:
        images = tokens = 0
        for batch in loader:
            images += len(batch)
            tokens += sum(to_arrays.count(sample["pixels"], sample["ids"]) for sample in batch)
        return Done(images, tokens)

    return run


# uint8 [h, w, 3], height, width -> uint8 [height, width, 3]
ResizePixels = Callable[[np.ndarray, int, int], np.ndarray]


def bare(job: Job, resize: ResizePixels) -> Callable[[], Done]:
    """Decode and resize only; the files lie in memory."""
    source = job.source()
    files = [source.example(index).images[0].data for index in range(len(source))]

    def run() -> Done:
        for data in files:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
            plan = job.to.plan(*pixels.shape[:2])
            resize(pixels, plan.height, plan.width)
        return Done(len(files))

    return run


def by_pillow(job: Job) -> ResizePixels:
    """Pillow's own resize by the job's rule."""
    rule = RESIZES[job.to.rule]

    def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
        image = Image.fromarray(pixels)
        return np.asarray(resample.pillow(image, height, width, rule.filter, rule.width_first))

    return resize


def by_simd(job: Job) -> ResizePixels:
    """fast_image_resize with the filter of the job's rule; 8 bits between its two passes, as Pillow."""
    import cykooz_resizer as library

    filters = {
        Image.Resampling.BILINEAR: library.FilterType.bilinear,
        Image.Resampling.BICUBIC: library.FilterType.catmull_rom,  # Pillow's, with a = -1/2
    }
    convolution = library.ResizeAlg.convolution(filters[RESIZES[job.to.rule].filter])
    options, resizer = library.ResizeOptions(resize_alg=convolution), library.Resizer()

    def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
        if pixels.shape[:2] == (height, width):
            return pixels
        old = library.ImageData(pixels.shape[1], pixels.shape[0], library.PixelType.U8x3, pixels.tobytes())
        new = library.ImageData(width, height, library.PixelType.U8x3)
        resizer.resize(old, new, options)
        return np.frombuffer(new.get_buffer(), np.uint8).reshape(height, width, 3)

    return resize


def contenders(job: Job) -> Iterator[tuple[str, Callable[[], Done]]]:
    """(name, pass) of every contender."""
    yield "ours", ours(job)
    yield "torch", torch_webdataset(job)
    if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.energon"):
        yield "energon", energon(job)
    yield "bare_pillow", bare(job, by_pillow(job))
    yield "bare_simd", bare(job, by_simd(job))
