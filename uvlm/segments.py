"""Segments: how queries that are only some of the keys are cut, so that one causal call is exact.

A document with text, an image that is context, and text again has keys everywhere and queries in the text alone. One
causal call aligned at the bottom right would let the first text see the image behind it. So each run of queries between
keys that are no queries is a segment, and its keys are all of its document's keys up to the run's end. The keys of a
document's earlier tokens are gathered once more for each of its segments: an image with text on both sides costs
little, but with many images that are context in one document it grows with their number's square, as attention itself
does (run: gathered to real keys 1.0 for one image, 4.5 for 8, 16.5 for 32).

Legend: K keys, Q queries, S segments, G gathered keys.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Segments(NamedTuple):
    """num_queries, num_keys, document: int64 [S]. keys: int64 [G], the rank of each gathered key among the K keys."""

    num_queries: np.ndarray
    num_keys: np.ndarray
    document: np.ndarray
    keys: np.ndarray


def cut_into_segments(is_query_K: np.ndarray, document_K: np.ndarray) -> Segments:
    """Segments of all keys of a pack, in the order of the pack.

    Args:
        is_query_K: bool, the keys that are queries too.
        document_K: int64, ascending, the document of each key.
    """
    follows_K = np.zeros(len(is_query_K), dtype=bool)
    follows_K[1:] = is_query_K[:-1] & (document_K[1:] == document_K[:-1])
    first = np.flatnonzero(is_query_K & ~follows_K)
    segment_Q = (np.cumsum(is_query_K & ~follows_K) - 1)[is_query_K]
    num_queries = np.bincount(segment_Q, minlength=len(first))
    document = document_K[first]
    document_start = np.searchsorted(document_K, document)
    num_keys = first + num_queries - document_start
    return Segments(num_queries, num_keys, document, ranges(document_start, num_keys))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [lengths.sum()]: starts[0], starts[0] + 1, ..., then starts[1], ...: one range after the other."""
    skipped = starts - np.cumsum(lengths) + lengths
    return np.arange(lengths.sum()) + np.repeat(skipped, lengths)
