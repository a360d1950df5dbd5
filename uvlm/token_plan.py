"""TokenPlan: which tokens of one pack take part in which layers.

A policy fills a table of roles (roles.py), layer by token; the plan is that table made ready for the forward pass.
**Tokens are left out, layers never are**: every rank calls every layer in every micro-step, which is what ZeRO-3 needs.

The plan is computed on the host from the pack, the policy and the pack's name, outside any checkpointed region, before
the forward pass. Neighbouring layers with equal roles share a span: states are gathered once at its entry and scattered
once at its exit. Tokens keep their original position ids; `cu_seqlens` is recomputed for those that are left. Where a
policy chooses tokens by score, the plan fixes how many and where they go (choice.py); only which ones is found on the
device.

Cost (run, one core): 32 layers, 32,768 tokens: dense 3.6 ms, `route` 3.8 ms, `pyramid` 4.7 ms, `himix` and `hmgen` with
projections of their own 19 ms.

Legend: L layers, T tokens in a pack, R rows in a span, Q of them queries, n documents, m images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from data_pipeline.encode import IGNORED
from data_pipeline.schema import TASKS
from uvlm.choice import Choice, choices_of
from uvlm.roles import DENSE, FFN, KEY, QUERY
from uvlm.segments import cut_into_segments

if TYPE_CHECKING:
    from data_pipeline.packing import Pack
    from uvlm.policies import Policy

KINDS = ("text", "input", "target")  # what a token belongs to: text, or an image by what it is for


class Work(NamedTuple):
    """Rows that a span's layers work on, int64 [len(TASKS) + 1] each, by task; the last entry is the unused tail.

    pairs: (query, key) pairs that attention allows.
    """

    queries: np.ndarray
    keys: np.ndarray
    ffn: np.ndarray
    pairs: np.ndarray


@dataclass(frozen=True)
class Parts:
    """A span's rows by the projection they go through: first those of the shared one, then each kind's own.

    rows: int64 [R], which row stands where in that order; sizes: rows of the shared part and of each of `kinds`.
    back: int64 [R], the inverse: where each row of the span stands in that order.
    """

    kinds: tuple[str, ...]
    sizes: tuple[int, ...]
    rows: torch.Tensor
    back: torch.Tensor


@dataclass(frozen=True)
class Span:
    """A run of layers, first <= layer < stop, in which the same tokens take part in the same roles.

    rows: int64 [R], the tokens that take part: queries in the order of the pack, then those that are keys only; None
        where all T are queries. num_rows is R, num_queries is Q.
    holes: int64, where in `rows` the tokens of the choice in force go; None where the plan knows all rows.
    keys: int64, rows of the span in the order in which segments see them; None where keys are queries.
    ffn: int64, the queries with an FFN; None where all have.
    cu_seqlens_q, cu_seqlens_k: int32, bounds of the segments; max_seqlen_q, max_seqlen_k: the longest.
    query_parts, key_parts: rows by projection; None where the shared ones serve all.
    """

    first: int
    stop: int
    rows: torch.Tensor | None
    num_rows: int
    num_queries: int
    holes: torch.Tensor | None
    keys: torch.Tensor | None
    ffn: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    query_parts: Parts | None
    key_parts: Parts | None
    work: Work


@dataclass(frozen=True)
class TokenPlan:
    """Spans that cover all layers in order, and the choices made at the entry of some of them.

    supervised: int64 [S], ascending positions with a label, which alone reach the head. Known on the host, so the
    device is never asked how many there are. supervised_by_task, images_by_task (of input images): int64
    [len(TASKS) + 1], as in Work. document_lengths: in tokens, the unused tail included.
    """

    spans: tuple[Span, ...]
    choices: tuple[Choice, ...]
    supervised: torch.Tensor
    supervised_by_task: np.ndarray
    images_by_task: np.ndarray
    document_lengths: tuple[int, ...]
    num_image_tokens: int

    @staticmethod
    def of(pack: Pack, policy: Policy, num_layers: int, seed: int = 0, progress: float = 0.0) -> TokenPlan:
        """The plan of one pack that is still on the host. Pure: (seed, pack.name) seeds everything random about it.

        Args:
            progress: share of the run that is done, for policies that change over a run.
        """
        policy, progress = policy.at(progress)
        view = _View(pack, policy)
        roles_LT = _table(pack, policy, num_layers, progress, np.random.default_rng([seed, *pack.name]))
        scored = policy.input.scored_layers(num_layers, progress)
        kept = [_num_kept(pack, roles_LT[layer]) for layer in scored]
        changes = (roles_LT[1:] != roles_LT[:-1]).any(axis=1)
        bounds = sorted({0, *(np.flatnonzero(changes) + 1).tolist(), *scored, num_layers})
        choices = choices_of(pack, scored, kept)
        supervised = np.flatnonzero(pack.labels.numpy() != IGNORED)
        return TokenPlan(
            spans=tuple(
                _span(first, stop, roles_LT[first], view, _num_chosen(choices, first))
                for first, stop in pairwise(bounds)
            ),
            choices=choices,
            supervised=torch.from_numpy(supervised),
            supervised_by_task=view.by_task(view.document_T[supervised]),
            images_by_task=view.by_task(view.document_T[pack.image_start[~pack.image_is_target].numpy()]),
            document_lengths=tuple(pack.cu_seqlens.diff().tolist()),
            num_image_tokens=int(view.is_image_T.sum()),
        )

    def to(self, device: torch.device) -> TokenPlan:
        """The same plan with its tensors on `device`; copies may still be under way when this returns."""
        return _moved(self, device)

    @property
    def num_layers(self) -> int:
        return self.spans[-1].stop

    @property
    def num_tokens(self) -> int:
        return sum(self.document_lengths)

    @property
    def query_share(self) -> float:
        """Share of (layer, token) pairs in which the token's state is updated."""
        num_updated = sum((span.stop - span.first) * span.num_queries for span in self.spans)
        return num_updated / (self.num_layers * self.num_tokens)

    @property
    def image_query_share(self) -> float:
        """The same of image tokens; text is always updated. 1 in a pack without images."""
        if not self.num_image_tokens:
            return 1.0
        return 1 - (1 - self.query_share) * self.num_tokens / self.num_image_tokens


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, and what holds them, on `device`; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if type(value) is tuple:
        return tuple(_moved(each, device) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
    return value


class _View:
    """What spans are made from: a pack's documents and images by token, as numpy."""

    def __init__(self, pack: Pack, policy: Policy) -> None:
        lengths = np.diff(pack.cu_seqlens.numpy())
        self.num_documents = len(lengths)
        self.document_T = np.repeat(np.arange(self.num_documents), lengths)
        self.task_n = pack.doc_task.numpy()
        self.kind_T = np.full(len(pack.ids), KINDS.index("text"), dtype=np.uint8)
        for start, num_codes, is_target in _images(pack):
            self.kind_T[start : start + num_codes] = KINDS.index("target" if is_target else "input")
        self.is_image_T = self.kind_T != KINDS.index("text")
        own = {"input": policy.input_projections, "target": policy.target_projections}
        self.query_kinds = tuple(kind for kind, projections in own.items() if projections == "qkv")
        self.key_kinds = tuple(kind for kind, projections in own.items() if projections != "shared")

    def by_task(self, document: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Sums of `weights`, or counts, by the task of each entry's document: int64 [len(TASKS) + 1]."""
        task = self.task_n[document] % (len(TASKS) + 1)  # the tail's -1 becomes the last entry
        return np.bincount(task, weights, minlength=len(TASKS) + 1).astype(np.int64)


def _images(pack: Pack) -> list[tuple[int, int, bool]]:
    """(first code, number of codes, is target) of each image."""
    num_codes = pack.image_hw[:, 0] * pack.image_hw[:, 1]
    return list(zip(pack.image_start.tolist(), num_codes.tolist(), pack.image_is_target.tolist(), strict=True))


def _table(pack: Pack, policy: Policy, num_layers: int, progress: float, generator: np.random.Generator) -> np.ndarray:
    """The role of each token in each layer, uint8 [L, T]."""
    roles_LT = np.full((num_layers, len(pack.ids)), DENSE, dtype=np.uint8)
    for start, num_codes, is_target in _images(pack):
        image_policy = policy.target if is_target else policy.input
        image_policy.fill(roles_LT[:, start : start + num_codes], progress, generator)
    return roles_LT


def _num_kept(pack: Pack, roles_T: np.ndarray) -> np.ndarray:
    """int64 [m]: tokens of each input image that take part."""
    images = [(start, num_codes) for start, num_codes, is_target in _images(pack) if not is_target]
    return np.array([(roles_T[start : start + n] >= KEY).sum() for start, n in images], dtype=np.int64)


def _num_chosen(choices: tuple[Choice, ...], layer: int) -> int | None:
    """Tokens of the choice that is in force in a layer."""
    made = [choice for choice in choices if choice.layer <= layer]
    return len(made[-1].picked) if made else None


def _span(first: int, stop: int, roles_T: np.ndarray, view: _View, num_chosen: int | None) -> Span:
    key_rows = np.flatnonzero(roles_T >= KEY)  # in the order of the pack
    key_documents = view.document_T[key_rows]
    is_query = roles_T[key_rows] >= QUERY
    rows = np.concatenate([key_rows[is_query], key_rows[~is_query]])
    num_queries = int(is_query.sum())
    is_symmetric = num_queries == len(rows)
    if is_symmetric:
        lengths_q = lengths_k = np.bincount(key_documents, minlength=view.num_documents)
        documents, keys = np.arange(view.num_documents), None
    else:
        lengths_q, lengths_k, documents, ranks = cut_into_segments(is_query, key_documents)
        place = np.empty(len(rows), dtype=np.int64)  # of each key, in the order of the pack, among the span's rows
        place[is_query], place[~is_query] = np.arange(num_queries), np.arange(num_queries, len(rows))
        keys = place[ranks]
    has_ffn = roles_T[rows[:num_queries]] >= FFN
    holes = np.flatnonzero(view.kind_T[rows] == KINDS.index("input"))
    is_chosen = num_chosen == len(holes)  # more take part where those left out have returned
    return Span(
        first=first,
        stop=stop,
        rows=None if num_queries == len(roles_T) else torch.from_numpy(rows),
        num_rows=len(rows),
        num_queries=num_queries,
        holes=torch.from_numpy(holes) if is_chosen and len(rows) < len(roles_T) else None,
        keys=None if keys is None else torch.from_numpy(keys),
        ffn=None if has_ffn.all() else torch.from_numpy(np.flatnonzero(has_ffn)),
        cu_seqlens_q=_bounds(lengths_q),
        cu_seqlens_k=_bounds(lengths_k),
        max_seqlen_q=int(lengths_q.max(initial=0)),
        max_seqlen_k=int(lengths_k.max(initial=0)),
        query_parts=_parts(view.kind_T[rows[:num_queries]], view.query_kinds),
        key_parts=_parts(view.kind_T[rows], view.key_kinds),
        work=Work(
            queries=view.by_task(view.document_T[rows[:num_queries]]),
            keys=view.by_task(key_documents),
            ffn=view.by_task(view.document_T[rows[:num_queries][has_ffn]]),
            pairs=view.by_task(documents, lengths_q * lengths_k - lengths_q * (lengths_q - 1) // 2),
        ),
    )


def _bounds(lengths: np.ndarray) -> torch.Tensor:
    """int32 [len + 1]: cumulated lengths. A document of which nothing is left has a length of zero, which is legal."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _parts(kind_R: np.ndarray, kinds: tuple[str, ...]) -> Parts | None:
    if not kinds:
        return None
    part_R = np.zeros(len(kind_R), dtype=np.int64)
    for number, kind in enumerate(kinds, 1):
        part_R[kind_R == KINDS.index(kind)] = number
    rows = np.argsort(part_R, kind="stable")
    back = np.empty_like(rows)
    back[rows] = np.arange(len(rows))
    sizes = tuple(np.bincount(part_R, minlength=len(kinds) + 1).tolist())
    return Parts(kinds, sizes, torch.from_numpy(rows), torch.from_numpy(back))
