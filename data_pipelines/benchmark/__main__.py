"""Measures the data side against other loaders, alternating in one run, and how full rows are.

    python -m data_pipelines.benchmark [--json]

Rates are per core: images over seconds of CPU time, of this process and its workers. Only the ratios mean
something on another machine; each is the median over the alternations.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.benchmark import packing, photos
from data_pipelines.benchmark.contenders import Done, Job, contenders
from data_pipelines.errors import DataError
from data_pipelines.resize import Resize
from data_pipelines.schema import Document, Image, Text

ROW_TOKENS = 8192
CAPTIONS_PER_PHOTO = 10  # for packing, which needs no pixels: more documents fill rows as a real run does


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--photos", type=int, default=400, help="photos in a pass (default: 400)")
    parser.add_argument("--alternations", type=int, default=5, help="passes of each contender (default: 5)")
    args = parser.parse_args(argv)
    try:
        found = measure(args.photos, args.alternations)
    except DataError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(found) if args.json else _written(found))
    return 0


def measure(num_photos: int, alternations: int) -> dict[str, Any]:
    """Runs everything.

    Returns:
        images_per_s, rows_per_s, tokens_per_s: ours, per core.
        ratio_vs_torch: images per core and second, over those of torch DataLoader + webdataset.
        packing_efficiency: share of the tokens of rows that are used.
        and the same of every other contender and way to pack.

    Raises:
        DataError: a library of the extra `benchmark` is missing.
    """
    folder = photos.folder(num_photos)
    to = Resize("neo", 32, 256 * 256, 1024 * 1024)
    job = Job(folder, ROW_TOKENS, ROW_TOKENS, to)
    documents = _documents(job)
    job = dataclasses.replace(job, row_patches=packing.patch_budget(documents, ROW_TOKENS))
    filled = {
        way.__name__: dataclasses.asdict(way(documents, ROW_TOKENS, job.row_patches))
        for way in (packing.two_budgets, packing.naive, packing.flatten_and_drop)
    }
    passes: dict[str, list[tuple[Done, float]]] = {}
    runs = dict(contenders(job))
    for name, run in runs.items():
        print(f"warming up {name}", file=sys.stderr)
        run()
    for i in range(alternations):
        for name, run in runs.items():
            passes.setdefault(name, []).append(_timed(run))
        print(f"alternation {i + 1}/{alternations}", file=sys.stderr)
    rates = {name: [done.images / seconds for done, seconds in made] for name, made in passes.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours, ours_seconds = passes["ours"][0][0], _median_seconds(passes["ours"])
    return {
        "images_per_s": round(medians["ours"], 1),
        "rows_per_s": round(ours.rows / ours_seconds, 2),
        "tokens_per_s": round(ours.tokens / ours_seconds),
        "ratio_vs_torch": _ratio(rates, "ours", "torch"),
        **({"ratio_vs_energon": _ratio(rates, "ours", "energon")} if "energon" in rates else {}),
        "ratio_vs_bare_pillow": _ratio(rates, "ours", "bare_pillow"),
        "ratio_vs_bare_simd": _ratio(rates, "ours", "bare_simd"),
        "packing_efficiency": round(filled["two_budgets"]["tokens"], 4),
        "packing": filled,
        "row_tokens": ROW_TOKENS,
        "row_patches": job.row_patches,
        "documents": len(documents),
        "photos": num_photos,
        "alternations": alternations,
        "images_per_s_of": {name: round(median, 1) for name, median in medians.items()},
    }


def _median_seconds(made: Sequence[tuple[Done, float]]) -> float:
    return statistics.median(seconds for _, seconds in made)


def _documents(job: Job) -> list[Document]:
    """Documents of every photo with several captions each; no pixel is decoded."""
    source, rules = job.source(), job.rules()
    documents = []
    texts = iter(photos.captions(len(source) * CAPTIONS_PER_PHOTO))
    for index in range(len(source)):
        example = source.example(index)
        image = next(span for span in example.spans if isinstance(span, Image))
        for number in range(CAPTIONS_PER_PHOTO):
            spans = (image, Text(next(texts), supervised=True))
            named = dataclasses.replace(example, id=f"{example.id}/{number}", spans=spans)
            documents.append(rules.document(named))
    return documents


def _timed(run: Callable[[], Done]) -> tuple[Done, float]:
    """What a pass did, and the CPU seconds that it took."""
    before = _cpu_seconds()
    done = run()
    return done, _cpu_seconds() - before


def _cpu_seconds() -> float:
    """Of this process, its threads and its living workers; webdataset's and torch's workers live on."""
    try:
        import psutil
    except ImportError as error:
        raise DataError(
            "the benchmark needs psutil: install the extra `benchmark` (pip install -e '.[benchmark]')"
        ) from error
    workers = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(worker.cpu_times()[:2]) for worker in workers)


def _ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    return round(statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)), 3)


def _written(found: dict[str, Any]) -> str:
    lines = [f"{found['photos']} photos, {found['alternations']} alternations, medians; per core:"]
    for name, rate in found["images_per_s_of"].items():
        lines.append(f"  {name:12} {rate:8.1f} images/s  {rate / found['images_per_s']:5.2f} of ours")
    lines.append(f"ours: {found['rows_per_s']} rows/s, {found['tokens_per_s']:,} tokens/s")
    lines.append(
        f"{found['documents']} documents in rows of {found['row_tokens']} tokens "
        f"and {found['row_patches']} image tokens:"
    )
    for name, filled in found["packing"].items():
        lines.append(
            f"  {name:16} {filled['tokens']:6.1%} of tokens used, {filled['patches']:6.1%} of image tokens, "
            f"{filled['rows']} rows, {filled['lost']} documents lost"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
