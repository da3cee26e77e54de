"""Which image goes to which split: by a hash of its key.

val_concept  whole roles are unseen (all tones, genders and styles)
val_combo    the role is in train, this role x gender x tone combination is in no style
val_render   the concept is in train in another style, this drawing is not
dev          like val_render; the split to tune on
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

SPLITS = ("train", "dev", "val_render", "val_combo", "val_concept")
SALT = "neo_jax quickstart 1"

SHARES = {
    "val_concept": 0.034,  # of roles
    "val_combo": 0.103,  # of gendered or toned concepts
    "val_render": 0.046,  # of images with a sibling in another style
    "dev": 0.02,  # of the same
}

GENDER_SIGNS = {"2640", "2642"}
TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
MAN_OR_WOMAN = {"1f468", "1f469"}
PERSON = "1f9d1"
JOINER = "200d"


def role(concept: str) -> str:
    """Returns the concept without joiners, gender and tone: what all its variants share."""
    parts = [part for part in concept.split("-") if part not in GENDER_SIGNS | TONES | {JOINER}]
    # A gender sign or a tone alone is a picture of its own.
    return "-".join(PERSON if part in MAN_OR_WOMAN else part for part in parts) or concept


def is_variant(concept: str) -> bool:
    """True if the concept names a gender or a tone of some role."""
    parts = set(concept.split("-"))
    return bool(parts & (GENDER_SIGNS | TONES | MAN_OR_WOMAN)) and role(concept) != concept


def unit_hash(purpose: str, key: str) -> float:
    """Maps a key to [0, 1), independently for each purpose."""
    digest = hashlib.sha1(f"{SALT}/{purpose}/{key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def assign(images: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Maps every (source, concept) to its split."""
    sources: dict[str, list[str]] = defaultdict(list)
    for source, concept in images:
        sources[concept].append(source)
    roles_with_base = {role(concept) for concept in sources if not is_variant(concept)}

    splits: dict[tuple[str, str], str] = {}
    for concept, styles in sources.items():
        if unit_hash("concept", role(concept)) < SHARES["val_concept"]:
            splits |= {(source, concept): "val_concept" for source in styles}
        elif (
            # The role's plain drawing is never held out here, so train knows the role.
            is_variant(concept)
            and role(concept) in roles_with_base
            and unit_hash("combo", concept) < SHARES["val_combo"]
        ):
            splits |= {(source, concept): "val_combo" for source in styles}
        else:
            draws = sorted((unit_hash("render", f"{source}/{concept}"), source) for source in styles)
            for draw, source in draws:
                # The highest draw of a concept always trains, so that one style of it is seen.
                held_out = source != draws[-1][1]
                if held_out and draw < SHARES["val_render"]:
                    splits[source, concept] = "val_render"
                elif held_out and draw < SHARES["val_render"] + SHARES["dev"]:
                    splits[source, concept] = "dev"
                else:
                    splits[source, concept] = "train"
    return splits


def find_leaks(splits: dict[tuple[str, str], str]) -> list[str]:
    """Returns one line per broken promise about what is unseen; empty when the splits are sound."""
    concepts: dict[str, set[str]] = defaultdict(set)
    roles: dict[str, set[str]] = defaultdict(set)
    for (_, concept), split in splits.items():
        concepts[split].add(concept)
        roles[split].add(role(concept))
    other_roles = set().union(*(roles[split] for split in SPLITS if split != "val_concept"))
    other_concepts = set().union(*(concepts[split] for split in SPLITS if split != "val_combo"))
    checks = {
        "role of val_concept also elsewhere": roles["val_concept"] & other_roles,
        "combination of val_combo also elsewhere": concepts["val_combo"] & other_concepts,
        "role of val_combo not in train": roles["val_combo"] - roles["train"],
        "concept of val_render not in train": concepts["val_render"] - concepts["train"],
        "concept of dev not in train": concepts["dev"] - concepts["train"],
    }
    return [f"{what}: {', '.join(sorted(keys))}" for what, keys in checks.items() if keys]
