"""What lies beside a finished shard, so that an interrupted run started again keeps it.

    shard-000000.tar.done.json   {"made_from": "...", "info": {...} or null, "facts": {...}}

`made_from` is one string over all that the shard depends on (its input, the options, another artefact's fingerprint):
a shard is kept exactly while that string and the shard's own bytes are what the record says. `info` is null where no
document of the input could be used; `facts` is what the caller counted.

Cost (run, a busy core): keeping a shard reads it once for its checksum, 0.5 GB/s; without the checksum 0.3 ms.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.files import replace_file
from data_pipeline.shards import MANIFEST_NAME, SHARD_PATTERN, ShardInfo, check_shard

RECORD_SUFFIX = ".done.json"


@dataclass(frozen=True)
class ShardRecord:
    made_from: str
    info: ShardInfo | None
    facts: dict[str, Any] = field(default_factory=dict)  # JSON

    def save(self, folder: Path, name: str) -> None:
        """Writes the record of shard `name`; after the shard itself."""
        replace_file(record_path(folder, name), json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path, name: str) -> ShardRecord | None:
        """None where there is no record or it cannot be understood, which means: make the shard."""
        try:
            record = json.loads(record_path(folder, name).read_bytes())
            info = record["info"]
            return cls(str(record["made_from"]), None if info is None else ShardInfo(**info), dict(record["facts"]))
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
            return None


def check_own(folder: Path, facts: dict[str, Any], makers: str) -> None:
    """ValueError where `folder` holds shards whose records lack these `facts`, or shards or a manifest without records:
    they are another's, and would be overwritten. A folder in which a run was killed before its first record is its own.

    `makers` is the glob of the folder in which a run of the caller makes its shards.
    """
    names = sorted(path.name.removesuffix(RECORD_SUFFIX) for path in folder.glob("*" + RECORD_SUFFIX))
    record = next((record for name in names if (record := ShardRecord.load(folder, name)) is not None), None)
    if record is not None:
        is_own = all(record.facts.get(name) == value for name, value in facts.items())
    else:
        holds = any(folder.glob("*.tar")) or (folder / MANIFEST_NAME).exists()
        is_own = not holds or any(folder.glob(makers))
    if not is_own:
        known = {} if record is None else record.facts
        made_from = f"made from {known['source']} as {known['format']}" if "format" in known else "of another origin"
        raise ValueError(f"{folder} holds shards {made_from}; name another folder, or remove this one")


def record_path(folder: Path, name: str) -> Path:
    return folder / (name + RECORD_SUFFIX)


def kept(folder: Path, name: str, made_from: str, *, checksum: bool = True) -> ShardRecord | None:
    """The record of a shard that was finished before, or None where anything about it has changed.

    `checksum=False` looks at sizes and the index only: for shards that another process has just written.
    """
    record = ShardRecord.load(folder, name)
    if record is None or record.made_from != made_from:
        return None
    if record.info is not None and (
        record.info.name != name or check_shard(folder, record.info, checksum=checksum) is not None
    ):
        return None
    return record


def remove_leftovers(folder: Path, names: Iterable[str], written: Iterable[str]) -> None:
    """Removes what an earlier run with other shards left behind, the manifest first, which may name it.

    `names` are all shards of this run, which keep their records; `written` are those that hold documents. Ours is what
    has a record or the name of a shard; other files stay. Several processes may do this at once.
    """
    names, written = set(names), set(written)
    ours = {path.name.removesuffix(RECORD_SUFFIX) for path in folder.glob("*" + RECORD_SUFFIX)} | names
    leftovers = []
    for path in folder.iterdir():
        name = path.name.removesuffix(".tmp").removesuffix(RECORD_SUFFIX).removesuffix(".idx")
        is_record = path.name == name + RECORD_SUFFIX
        is_ours = path.is_file() and (name in ours or SHARD_PATTERN.fullmatch(name) is not None)
        if is_ours and (path.name.endswith(".tmp") or name not in (names if is_record else written)):
            leftovers.append(path)
    if leftovers:
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for path in leftovers:
        path.unlink(missing_ok=True)
