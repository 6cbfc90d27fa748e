"""Duplicates: exact ones counted in bounded memory, near ones clustered (how they are found: `near`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

HASHES = 1_000_000  # kept at most; beyond, a sample
SHINGLE = 3  # words


def text_hash(text: str) -> int:
    """64 bits of blake2b over the casefolded text with whitespace collapsed: equal for "A  b" and "a b"."""
    return words_hash(text.casefold().split())


def words_hash(words: Sequence[str]) -> int:
    """`text_hash` of casefolded words."""
    plain = " ".join(words).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), "big")


@dataclass
class Duplicates:
    """A running count of texts that equal an earlier one: exact up to HASHES distinct texts, then estimated.

    Kept are the texts whose hash is below `limit`; it is halved when there are too many, and the count
    among the kept is scaled by 2^64 / limit. Copies share their fate: the estimate has no bias.
    """

    limit: int = 1 << 64
    counts: dict[int, int] = field(default_factory=dict, repr=False)

    def add(self, text: str) -> None:
        """Count one text."""
        number = text_hash(text)
        if number >= self.limit:
            return
        self.counts[number] = self.counts.get(number, 0) + 1
        while len(self.counts) > HASHES:
            self.limit //= 2
            self.counts = {number: n for number, n in self.counts.items() if number < self.limit}

    @property
    def exact(self) -> bool:
        """Whether every text was kept."""
        return self.limit == 1 << 64

    @property
    def count(self) -> int:
        """Texts that equal an earlier one."""
        return round((sum(self.counts.values()) - len(self.counts)) * (1 << 64) / self.limit)


def exact_duplicates(texts: Iterable[str]) -> Duplicates:
    """Count the texts that equal an earlier one, but for case and whitespace, in one pass."""
    duplicates = Duplicates()
    for text in texts:
        duplicates.add(text)
    return duplicates


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[list[int]]:
    """Clusters (ascending indices, two or more) of texts whose 3-word shingles overlap: Jaccard >= threshold.

    Each text is compared with the first texts of the clusters so far, exactly, and joins the earliest that is near
    enough: so time stays linear where everything is alike, and the result is the same on every run.
    """
    from embedtune.data.near import leaders
    from embedtune.data.shingles import sets_of

    clusters: dict[int, list[int]] = {}
    for number, leader in enumerate(leaders(sets_of([text] for text in texts), threshold).tolist()):
        clusters.setdefault(leader, []).append(number)
    return [cluster for cluster in clusters.values() if len(cluster) > 1]


def shingles(text: str) -> set[str]:
    """All runs of 3 words, casefolded; a shorter text is its own only shingle."""
    words = text.casefold().split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
