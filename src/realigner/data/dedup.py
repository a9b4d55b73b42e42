"""Nearly equal texts: MinHash finds candidates (datasketch), their shingles decide.

Two texts are near-duplicates when the Jaccard similarity of their sets of word triples is at least 0.8 (Broder 1997). MinHash
and its index only propose; every proposal is verified on the sets themselves, so nothing is called a near-duplicate that is
not. The index misses few: the chance of being proposed is 0.99 at a similarity of 0.8.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from realigner.data.words import WORD

THRESHOLD = 0.8
_PERMUTATIONS, _BANDS = 60, (12, 5)  # chance of being proposed at similarity s: 1 - (1 - s ** 5) ** 12, 0.992 at 0.8
_WORDS = 3  # words of a shingle
_LETTERS = 4  # letters of a shingle, where there is one word only (scripts without spaces)


class NearDuplicates:
    """The texts seen so far.

    Example:
        >>> seen = NearDuplicates()
        >>> seen.add("1", "It is the Vltava, as any map of Prague would have told you at once!")
        >>> seen.add("2", "It is the Vltava, as any map of Prague would have told you at once, really!")
        '1'
    """

    def __init__(self) -> None:
        self._empty = MinHash(num_perm=_PERMUTATIONS, hashfunc=int)
        self._index = MinHashLSH(  # a band's key is of eight bytes, to keep the index small
            num_perm=_PERMUTATIONS, params=_BANDS, hashfunc=lambda key: hashlib.blake2b(key, digest_size=8).digest()
        )
        self._keys: list[str] = []
        self._shingles: list[NDArray[np.uint32]] = []

    def add(self, key: str, text: str) -> str | None:
        """Remember a text, unless an earlier one is nearly the same: then the key of that one is returned."""
        mine = shingles(text)
        minhash = self._empty.copy()
        minhash.update_batch(mine.tolist())
        for number in sorted(self._index.query(minhash)):
            if similarity(mine, self._shingles[number]) >= THRESHOLD:
                return self._keys[int(number)]
        self._index.insert(len(self._keys), minhash, check_duplication=False)
        self._keys.append(key)
        self._shingles.append(mine)
        return None


def shingles(text: str) -> NDArray[np.uint32]:
    """The sorted set of hashes of a text's word triples (of fewer than six words: its words), upper and lower case alike."""
    words = WORD.findall(text.casefold())
    if len(words) >= 2 * _WORDS:
        parts = {" ".join(words[start : start + _WORDS]) for start in range(len(words) - _WORDS + 1)}
    elif len(words) > 1:
        parts = set(words)
    else:
        letters = " ".join(words)
        parts = {letters[start : start + _LETTERS] for start in range(max(1, len(letters) - _LETTERS + 1))}
    return np.sort(np.fromiter({zlib.crc32(part.encode()) for part in parts}, dtype=np.uint32))


def similarity(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> float:
    """Jaccard similarity of two sets of shingles: size of the intersection over size of the union."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
