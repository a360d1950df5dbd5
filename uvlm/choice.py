"""Choice: of each image's tokens, the k with the highest scores, without asking the device anything.

How many tokens of an image stay is known on the host, so every shape is; only which ones is found on the device, by a
detached score. A later choice chooses among the tokens that the choice before has left.

Legend: m images, C candidates of an image (padded), W scoring tokens of an image (padded), k tokens that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.encode import IGNORED, IMAGE
from data_pipeline.packing import Pack
from uvlm.segments import ranges

NUM_SCORING = 8  # text tokens of a document that score its images: the last ones before its first supervised token


@dataclass(frozen=True)
class Choice:
    """Which tokens stay from `layer` on. All tensors may lie on a device.

    candidates: int64 [m, C], rows of the pack; None where they are what the choice before has left.
    is_candidate: bool [m, C], False where an image has fewer; num_kept: int64 [m].
    scoring: int64 [m, W], rows of the pack; is_scoring: bool [m, W].
    most: the largest num_kept; picked: int64 [sum of num_kept], indices into the flattened [m, most].
    """

    layer: int
    candidates: torch.Tensor | None
    is_candidate: torch.Tensor
    num_kept: torch.Tensor
    scoring: torch.Tensor
    is_scoring: torch.Tensor
    most: int
    picked: torch.Tensor

    def best(self, candidates: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The rows that stay, int64 [m, most], ascending in each image; beyond num_kept an entry means nothing.

        Args:
            candidates: int64 [m, C]; scores: [m, C], only those of candidates count.
        """
        num_candidates = candidates.shape[1]
        order = scores.masked_fill(~self.is_candidate, -torch.inf).topk(self.most, dim=1).indices
        is_kept = torch.arange(self.most, device=order.device) < self.num_kept[:, None]
        columns = order.masked_fill(~is_kept, num_candidates).sort(dim=1).values
        return candidates.gather(1, columns.clamp(max=num_candidates - 1))


def choices_of(pack: Pack, layers: tuple[int, ...], num_kept_by_layer: list[np.ndarray]) -> tuple[Choice, ...]:
    """The choices among a pack's input images at the entry of some layers, ascending.

    Args:
        num_kept_by_layer: for each of `layers`, int64 [m], the tokens of each input image that stay.
    """
    is_input = ~pack.image_is_target.numpy()
    starts = pack.image_start.numpy()[is_input]
    num_left = pack.image_hw.numpy()[is_input].prod(axis=1)
    if not len(starts):  # the modules that score are called all the same, by every rank: with an image of no tokens
        starts, num_left = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        num_kept_by_layer = [num_left for _ in layers]
    scoring, num_scoring = _scoring_tokens(pack, starts)
    candidates: torch.Tensor | None = _padded(starts, num_left)
    choices = []
    for layer, num_kept in zip(layers, num_kept_by_layer, strict=True):
        most = max(1, num_kept.max(initial=0))
        width = max(1, num_left.max(initial=0))
        choices.append(
            Choice(
                layer=layer,
                candidates=candidates,
                is_candidate=_is_within(num_left, width),
                num_kept=torch.from_numpy(num_kept),
                scoring=scoring,
                is_scoring=_is_within(num_scoring, NUM_SCORING),
                most=int(most),
                picked=torch.from_numpy(ranges(np.arange(len(num_kept)) * most, num_kept)),
            )
        )
        num_left, candidates = num_kept, None
    return tuple(choices)


def _padded(starts: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """int64 [m, most]: starts[i], starts[i] + 1, ...; the last one is repeated."""
    columns = np.minimum(np.arange(max(1, lengths.max(initial=0))), np.maximum(lengths - 1, 0)[:, None])
    return torch.from_numpy(starts[:, None] + columns)


def _is_within(lengths: np.ndarray, width: int) -> torch.Tensor:
    return torch.from_numpy(np.arange(width) < lengths[:, None])


def _scoring_tokens(pack: Pack, starts: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Rows of the text tokens that score each image, int64 [m, NUM_SCORING], and how many of them count."""
    bounds = pack.cu_seqlens.numpy()
    is_text = pack.segment.numpy() != IMAGE
    is_supervised = pack.labels.numpy() != IGNORED
    rows = np.zeros((len(starts), NUM_SCORING), dtype=np.int64)
    counts = np.zeros(len(starts), dtype=np.int64)
    for i, document in enumerate(np.searchsorted(bounds, starts, side="right") - 1):
        begin, end = bounds[document : document + 2]
        # Position t with a label predicts token t + 1, so t itself is still known where the first prediction is made.
        supervised = np.flatnonzero(is_supervised[begin:end])
        end = begin + supervised[0] + 1 if len(supervised) else end
        text = begin + np.flatnonzero(is_text[begin:end])[-NUM_SCORING:]
        rows[i, : len(text)], counts[i] = text, len(text)
    return torch.from_numpy(rows), counts
