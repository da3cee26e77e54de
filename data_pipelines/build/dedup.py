"""Duplicates: stages that need to see all records that share a key.

A dedup rule gives every record some keys and its evidence; records that share a key are candidates, and among
them the ones that come first stay. So the engine only groups by key (SQLite on one machine, GroupByKey on a
cluster), and the rule itself is two pure functions. A record is left out if in any of its groups an earlier,
similar one is kept. Which comes earlier is decided by (shard, record) of the input.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from data_pipelines import images
from data_pipelines.build.filters import text_of, words
from data_pipelines.build.items import Place
from data_pipelines.errors import DataError
from data_pipelines.schema import Example

NO_KEYS: tuple[list[bytes], bytes] = ([], b"")


class Candidate(NamedTuple):
    """One record in the group of a key."""

    place: Place
    id: str
    evidence: bytes


class Loser(NamedTuple):
    """A record that is left out, because `kept` is there."""

    place: Place
    kept: str  # id


class Rule(Protocol):
    """A dedup rule: a frozen dataclass, as a filter is."""

    reason: str

    def keys(self, example: Example) -> tuple[list[bytes], bytes]:
        """(keys, evidence); no keys if the rule has nothing to say about the record."""

    def similar(self, one: bytes, other: bytes) -> bool:
        """Whether two records of one group are duplicates, from their evidence."""


def losers(rule: Rule, group: Iterable[Candidate]) -> Iterator[Loser]:
    """Yields the candidates of one key that are left out; the group's order does not matter."""
    kept: list[Candidate] = []
    for candidate in sorted(group):
        for earlier in kept:
            if rule.similar(earlier.evidence, candidate.evidence):
                yield Loser(candidate.place, earlier.id)
                break
        else:
            kept.append(candidate)


@dataclasses.dataclass(frozen=True)
class ExactImage:
    """The same image files in the same order; documents without images are left alone."""

    reason = "duplicate_image"

    def keys(self, example: Example) -> tuple[list[bytes], bytes]:
        if not example.images:
            return NO_KEYS
        digests = (hashlib.sha256(image.data).digest() for image in example.images)
        return [hashlib.sha256(b"".join(digests)).digest()[:16]], b""

    def similar(self, one: bytes, other: bytes) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class SimilarImage:
    """Images that look the same: perceptual hashes (imagehash.phash) at most `max_distance` of 64 bits apart.

    The hash is cut into max_distance + 1 bands, so that two hashes within the distance share at least one of
    them: no pair is missed. A document of several images is a duplicate if each of them looks like the
    other's of the same number.
    """

    max_distance: int = 3
    reason = "similar_image"

    def keys(self, example: Example) -> tuple[list[bytes], bytes]:
        if not example.images:
            return NO_KEYS
        hashes = b"".join(_perceptual_hash(image.data) for image in example.images)
        bits = np.unpackbits(np.frombuffer(hashes, np.uint8)).reshape(len(example.images), 64)
        bands = np.array_split(bits[0], self.max_distance + 1)  # of the first: one band in common is enough
        prefix = len(example.images).to_bytes(4)
        return [prefix + bytes([i]) + np.packbits(band).tobytes() for i, band in enumerate(bands)], hashes

    def similar(self, one: bytes, other: bytes) -> bool:
        pairs = (np.frombuffer(hashes, np.uint8).reshape(-1, 8) for hashes in (one, other))
        difference = np.bitwise_xor(*pairs)
        return bool(np.bitwise_count(difference).sum(axis=1).max() <= self.max_distance)


@dataclasses.dataclass(frozen=True)
class ExactText:
    """The same words in the same order, whatever the case, punctuation and white space.

    Args:
        min_words: shorter texts are left alone: "red car" is no copy of another red car's caption.
    """

    min_words: int = 8
    reason = "duplicate_text"

    def keys(self, example: Example) -> tuple[list[bytes], bytes]:
        found = words(text_of(example))
        if len(found) < self.min_words:
            return NO_KEYS
        return [hashlib.sha256(" ".join(found).encode()).digest()[:16]], b""

    def similar(self, one: bytes, other: bytes) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class SimilarText:
    """Texts whose sets of `gram`-word runs have an estimated Jaccard index of at least `threshold` (MinHash).

    `bands` x `rows` hash values (datasketch): two texts of Jaccard index s share a band with probability
    1 - (1 - s**rows)**bands, 95 % at 0.8 and over 99.9 % at 0.9 with the defaults.
    """

    threshold: float = 0.8
    gram: int = 5
    bands: int = 16
    rows: int = 8
    min_words: int = 8  # shorter texts are left alone
    reason = "similar_text"

    def keys(self, example: Example) -> tuple[list[bytes], bytes]:
        found = words(text_of(example))
        if len(found) < self.min_words:
            return NO_KEYS
        runs = {" ".join(found[i : i + self.gram]) for i in range(max(1, len(found) - self.gram + 1))}
        signature = _minhash(runs, self.bands * self.rows).reshape(self.bands, self.rows)
        keys = [bytes([i]) + hashlib.sha256(band.tobytes()).digest()[:12] for i, band in enumerate(signature)]
        return keys, signature.tobytes()

    def similar(self, one: bytes, other: bytes) -> bool:
        same = np.frombuffer(one, np.uint32) == np.frombuffer(other, np.uint32)
        return bool(same.mean() >= self.threshold)


def _perceptual_hash(data: bytes) -> bytes:
    """8 bytes. Raises Reject if the image cannot be decoded."""
    try:
        import imagehash
    except ImportError as error:
        raise _missing("imagehash") from error
    image = images.flatten(images.decode(data))
    return np.packbits(imagehash.phash(image).hash).tobytes()


def _minhash(items: Iterable[str], num_hashes: int) -> np.ndarray:
    """uint32 [num_hashes]."""
    try:
        import datasketch
    except ImportError as error:
        raise _missing("datasketch") from error
    # The scheme is named because its values go into the shards' bytes: they decide what is left out.
    sketch = datasketch.MinHash(num_perm=num_hashes, seed=1, scheme="affine32")
    sketch.update_batch([item.encode() for item in items])
    return sketch.hashvalues


def _missing(package: str) -> DataError:
    return DataError(
        f"this dedup rule needs {package}: install the extra `build` (pip install -e '.[build]')"
    )
