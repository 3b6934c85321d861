"""WebShop's search: BM25 as Lucene computes it, over an index on disk that all processes of a machine share.

Lucene stores the length of a document in one byte, computes the score of each term in single precision and adds the scores in
double precision. Documents with equal scores are ordered by asin. All of this affects the first page of results. Arrays, for T
terms and P postings:

    offsets (T + 1)  start of the postings of each term
    docs (P)         documents that contain a term, in order
    scale (P)        1 + frequency / (k1 (1 - b + b length / mean length)), in single precision
"""

import math
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from aem_exp.envs.webshop.analyzer import analyze

K1, B = 0.9, 0.4  # as in Anserini
PARALLEL: Final = 20_000  # fewer documents are analysed by one process
CHUNK: Final = 2_000  # documents that a process analyses at a time
BLOCK: Final = 512  # documents in a block; the best scores of the blocks give a first bound


class Index:
    """An index in a folder. `order` is the rank of each document by asin."""

    def __init__(self, folder: Path):
        self.offsets, self.docs, self.scale, self.order = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "docs", "scale", "order")
        )
        self._count = int(np.load(folder / "count.npy"))
        self._terms = _TermTable(folder)

    def search(self, query: str, count: int) -> list[int]:
        """The numbers of the best documents for a query, at most `count`."""
        frequencies = Counter(analyze(query))
        terms = [
            (number, times) for term, times in frequencies.items() if (number := self._terms.find(term)) is not None
        ]
        if not terms:
            return []
        docs, gains = [], []
        for number, times in terms:
            start, end = int(self.offsets[number]), int(self.offsets[number + 1])
            weight = np.float32(times) * self._idf(end - start)
            docs.append(self.docs[start:end])
            gains.append(weight - weight / self.scale[start:end])
        return self._select_best(docs, gains, count)

    def _idf(self, frequency: int) -> np.float32:
        return np.float32(math.log(1 + (self._count - frequency + 0.5) / (frequency + 0.5)))

    def _select_best(self, docs: Sequence[np.ndarray], gains: Sequence[np.ndarray], count: int) -> list[int]:
        total = np.zeros(-(-len(self.order) // BLOCK) * BLOCK)
        for term_docs, gain in zip(docs, gains, strict=True):
            total[term_docs] += gain  # no document occurs twice in `term_docs`
        chosen = np.flatnonzero(total >= self._score_bound(total, count))
        scores = total[chosen].astype(np.float32)
        best = chosen[np.lexsort((self.order[chosen], -scores))]
        return [int(doc) for doc in best[:count]]

    def _score_bound(self, total: np.ndarray, count: int) -> float:
        """A score that the best `count` documents reach, also after rounding. Computed from the best scores of the blocks."""
        blocks = total.reshape(-1, BLOCK).max(axis=1)
        bound = np.partition(blocks, -count)[-count] if len(blocks) > count else 0.0
        return max(float(bound) * (1 - 1e-6), np.nextafter(0, 1))


class _TermTable:
    """The sorted terms of an index, in one file, with binary search."""

    def __init__(self, folder: Path):
        self._bytes = np.memmap(folder / "terms.bin", mode="r") if (folder / "terms.bin").stat().st_size else b""
        self._starts = np.load(folder / "term_starts.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> bytes:
        return bytes(self._bytes[self._starts[number] : self._starts[number + 1]])

    def find(self, term: str) -> int | None:
        wanted = term.encode(errors="surrogatepass")
        number = bisect_left(range(len(self)), wanted, key=self.__getitem__)
        return number if number < len(self) and self[number] == wanted else None


# Building.


def build_index(
    folder: Path, texts: Iterable[str], asins: Sequence[str], report_progress: Any = lambda *_: None
) -> None:
    """Write the index of texts, one for each asin in the same order.

    Raises:
        OSError: a helper process was killed.
    """
    numbers: dict[str, int] = {}
    terms, docs, counts = [], [], []
    lengths = np.zeros(len(asins), dtype=np.int64)
    for doc, (length, frequencies) in enumerate(_analyze_texts(iter(texts), len(asins))):
        lengths[doc] = length
        terms.append(np.fromiter((numbers.setdefault(term, len(numbers)) for term in frequencies), np.int32))
        counts.append(np.fromiter(frequencies.values(), np.int32))
        docs.append(len(frequencies))
        if doc % 1000 == 0:
            report_progress(doc, len(asins))
    term_P, count_P = _concatenate(terms, np.int32), _concatenate(counts, np.int32)
    doc_P = np.repeat(np.arange(len(asins), dtype=np.int32), docs)
    names = sorted((term.encode(errors="surrogatepass"), number) for term, number in numbers.items())
    place = np.empty(len(names), dtype=np.int32)
    place[[number for _, number in names]] = np.arange(len(names), dtype=np.int32)
    term_P = place[term_P] if len(names) else term_P
    order = np.argsort(term_P, kind="stable")  # by term, then by document
    _save(folder, offsets=np.searchsorted(term_P[order], np.arange(len(names) + 1)), docs=doc_P[order])
    _save(folder, scale=_compute_scale(count_P[order], doc_P[order], lengths))
    by_asin = np.argsort(np.array([asin.encode() for asin in asins]), kind="stable")
    rank = np.empty(len(asins), dtype=np.int32)
    rank[by_asin] = np.arange(len(asins), dtype=np.int32)
    _save(folder, order=rank, count=np.array(np.count_nonzero(lengths)))  # Lucene does not count empty documents
    _save(folder, term_starts=np.cumsum([0, *(len(name) for name, _ in names)]))
    (folder / "terms.bin").write_bytes(b"".join(name for name, _ in names))


def _concatenate(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _save(folder: Path, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _compute_scale(count_P: np.ndarray, doc_P: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """1 + frequency x inverse norm, with the order of operations and the precision of Lucene's BM25Similarity."""
    mean = np.float32(lengths.sum() / max(1, np.count_nonzero(lengths)))
    k1, b, one = np.float32(K1), np.float32(B), np.float32(1)
    table = np.array([_decode_length(byte) for byte in range(256)], dtype=np.float32)
    inverse = one / (k1 * ((one - b) + b * table / mean))
    norms = np.array([_encode_length(int(length)) for length in lengths], dtype=np.uint8)
    return one + count_P.astype(np.float32) * inverse[norms[doc_P]]


def _analyze_texts(texts: Iterator[str], count: int) -> Iterator[tuple[int, Counter[str]]]:
    """Length and term frequencies of each text. Uses all processors if there are many texts."""
    if count < PARALLEL:
        yield from map(_count_terms, texts)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = iter(lambda: list(islice(texts, CHUNK)), [])
    try:
        # unlike multiprocessing.Pool, this raises if a process is killed
        with ProcessPoolExecutor(processors, get_context("spawn")) as pool:
            for batch in iter(lambda: list(islice(parts, 4 * processors)), []):  # limits the texts in memory
                for counted in pool.map(_count_terms_of_all, batch):
                    yield from counted
    except BrokenProcessPool as error:
        raise OSError(f"one of {processors} indexing processes was killed, perhaps because memory ran out") from error


def _count_terms_of_all(texts: list[str]) -> list[tuple[int, Counter[str]]]:
    return list(map(_count_terms, texts))


def _count_terms(text: str) -> tuple[int, Counter[str]]:
    terms = analyze(text)
    return len(terms), Counter(terms)


# Lucene's SmallFloat: a length in one byte; exact below 40, with four significant bits from there on.

_EXACT_LENGTHS: Final = 24  # lengths without an exponent


def _encode_length(length: int) -> int:
    if length < _EXACT_LENGTHS:
        return length
    rest = length - _EXACT_LENGTHS
    bits = rest.bit_length()
    if bits < 4:
        return _EXACT_LENGTHS + rest
    shift = bits - 4
    return _EXACT_LENGTHS + (((rest >> shift) & 7) | (shift + 1) << 3)


def _decode_length(byte: int) -> int:
    if byte < _EXACT_LENGTHS:
        return byte
    bits, shift = (byte - _EXACT_LENGTHS) & 7, ((byte - _EXACT_LENGTHS) >> 3) - 1
    return _EXACT_LENGTHS + (bits if shift < 0 else (bits | 8) << shift)
