"""Format `webdataset`: shards that already hold our documents, cut anew into shards of another size.

Everything of a document is kept: its key (with its number added where it came before), its json and its images. Codes
are kept only where the source folder has a manifest that names their tokenizer, which the new manifest then names too;
codes of an unknown tokenizer are worth nothing and are dropped (`worker.py` does that).
"""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.convert.fields import json_object
from data_pipeline.convert.options import Options
from data_pipeline.schema import Document, Rejected

CONTAINERS = ("tar",)


def draft(key: str, record: dict[str, Any], options: Options) -> Document | Rejected:
    name, members = record["__key__"], {suffix: data for suffix, data in record.items() if suffix != "__key__"}
    if "json" in members:  # members are in lower case by now, so the names of images must be too
        document = json_object(members["json"])
        if isinstance(document, str):
            return Rejected(key, document)
        images = document.get("images")
        if isinstance(images, list) and any(isinstance(image, str) and image != image.lower() for image in images):
            document["images"] = [image.lower() if isinstance(image, str) else image for image in images]
            members["json"] = json.dumps(document).encode()
    return Document.from_members(name, members)
