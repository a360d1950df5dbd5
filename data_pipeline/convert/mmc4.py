"""Format `mmc4`: sentences, and images each matched to one of them.

    {"text_list": ["A lion sleeps.", "It wakes."], "url": "https://host/page",
     "image_info": [{"image_name": "b9.jpg", "raw_url": "https://host/b9.jpg", "matched_text_index": 1}],
     "similarity_matrix": [[0.2, 0.3]]}

An image stands directly before the sentence it is matched with, so that the sentence, which carries the loss, is
predicted from the image and the model has a reason to look at it; several images of one sentence keep their order.
Where no image has a `matched_text_index`, images are matched by the one-to-one assignment of the highest total
similarity, as the corpus itself was made. Images without a match are left out, and a document left with none is
rejected. Sentences between two images are joined by a space to one text: the cut into sentences was made for matching,
and a model should not learn to end its output at each of them.

Which image is meant: where any image of a document is inline (`image_base64`, the tars of OpenFlamingo), the inline
ones, because its maker could not get the others; else `image_name` below `--image-root` if that is given; else
`raw_url`. Cost (run): 19 us for 40 sentences with 5 matched images, 31 us with an assignment (scipy).
"""

from __future__ import annotations

import base64
from typing import Any

from data_pipeline.convert.draft import Draft, ImageReference
from data_pipeline.convert.fields import is_encodable, json_object
from data_pipeline.convert.options import Options
from data_pipeline.schema import RefusedError, Rejected

CONTAINERS = ("jsonl", "tar")


def draft(key: str, record: dict[str, Any], options: Options) -> Draft | Rejected:
    """The document of one record, or of the json member of a tar's sample, or why there is none."""
    if isinstance(record.get("json"), bytes):
        member = json_object(record["json"])
        if isinstance(member, str):
            return Rejected(key, member)
        record = member
    try:
        sentences, infos = record.get("text_list"), record.get("image_info")
        if not isinstance(sentences, list) or not sentences or not all(isinstance(item, str) for item in sentences):
            raise RefusedError("text_list is not a list of sentences")
        if not isinstance(infos, list) or not all(isinstance(item, dict) for item in infos):
            raise RefusedError("image_info is not a list of objects")
        is_inline = any(info.get("image_base64") is not None for info in infos)
        kept = [i for i, info in enumerate(infos) if not is_inline or info.get("image_base64") is not None]
        before: dict[int, list[ImageReference]] = {}  # sentence -> the images in front of it
        for i, sentence in _matches(kept, infos, record.get("similarity_matrix"), len(sentences)):
            before.setdefault(sentence, []).append(_reference(infos[i], options))
    except RefusedError as refused:
        return Rejected(key, str(refused))
    if not before:
        return Rejected(key, "no image is matched to a sentence")
    if not any(sentence.strip() for sentence in sentences):
        return Rejected(key, "document has no text")
    slots: list[tuple[str | None, ImageReference | None]] = []
    for i, sentence in enumerate(sentences):
        slots += [(None, image) for image in before.get(i, [])]
        if not sentence.strip():
            continue
        if slots and slots[-1][0] is not None:
            slots[-1] = (f"{slots[-1][0]} {sentence.strip()}", None)
        else:
            slots.append((sentence.strip(), None))
    url = record.get("url")
    meta = {"url": url} if isinstance(url, str) and is_encodable(url) else {}
    return Draft([text for text, _ in slots], [image for _, image in slots], "interleave", meta=meta)


def _matches(
    kept: list[int], infos: list[dict[str, Any]], similarity: Any, num_sentences: int
) -> list[tuple[int, int]]:
    """(image, sentence) of each kept image that has a match, in the order of the images."""
    given = {i: infos[i]["matched_text_index"] for i in kept if infos[i].get("matched_text_index") is not None}
    if given:
        if not all(type(j) is int and 0 <= j < num_sentences for j in given.values()):
            raise RefusedError("matched_text_index is not the index of a sentence")
        return list(given.items())
    if not kept:
        return []
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    is_matrix = isinstance(similarity, list) and len(similarity) == len(infos)
    if not is_matrix or not all(isinstance(row, list) and len(row) == num_sentences for row in similarity):
        raise RefusedError("similarity_matrix is not of shape [images, sentences]")
    if not all(type(value) is float or type(value) is int for row in similarity for value in row):
        raise RefusedError("similarity_matrix holds something else than numbers")
    try:
        matrix = np.array([similarity[i] for i in kept], dtype=np.float64)
    except OverflowError:
        raise RefusedError("similarity_matrix holds something else than finite numbers") from None
    if not np.isfinite(matrix).all():
        raise RefusedError("similarity_matrix holds something else than finite numbers")
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    return [(kept[row], int(column)) for row, column in zip(rows, columns, strict=True)]


def _reference(info: dict[str, Any], options: Options) -> ImageReference:
    inline = info.get("image_base64")
    if inline is not None:
        try:
            # OpenFlamingo's script writes str(bytes), which puts b'...' around the base64
            content = base64.b64decode(inline.removeprefix("b'").removesuffix("'"), validate=True)
        except (ValueError, AttributeError):
            content = b""
        if not content:
            raise RefusedError("image_base64 cannot be decoded")
        return content
    field = "raw_url" if options.image_root is None else "image_name"
    if not isinstance(info.get(field), str) or not info[field]:
        raise RefusedError(f"an image has no {field}")
    return str(info[field])
