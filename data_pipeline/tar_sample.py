"""The members of one sample from its bytes of a tar.

Reading never extracts to disk, and a link or device inside a tar is refused. What our own writer makes is parsed here,
five times as fast as by tarfile; anything else, and any doubt, is left to tarfile.
"""

from __future__ import annotations

import io
import tarfile

from data_pipeline.schema import Document, Rejected

BLOCK = 512  # bytes; a tar consists of such blocks


def read_sample(place: str, content: bytes) -> Document | Rejected:
    """A document from the tar bytes of one sample; `place` names it where it has no key."""
    members = _plain_members(content)
    if members is None:
        try:
            members = _any_members(content)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            return Rejected(place, f"tar cannot be read: {error}")
    by_suffix: dict[str, bytes] = {}
    keys: set[str] = set()
    for name, data in members:
        folder, slash, base = name.rpartition("/")
        key, _, suffix = base.partition(".")
        keys.add(folder + slash + key)
        if suffix in by_suffix:
            return Rejected(place, f"a member comes twice: {name}")
        by_suffix[suffix] = data
    if len(keys) != 1:
        return Rejected(place, "sample holds no member or members of several keys")
    return Document.from_members(keys.pop(), by_suffix)


def _plain_members(content: bytes) -> list[tuple[str, bytes]] | None:
    """(name, data) of ordinary files with short names; None if there is anything else
    or any doubt, and tarfile decides."""
    members = []
    position = 0
    while position < len(content):
        header = content[position : position + BLOCK]
        checksum = sum(header) - sum(header[148:156]) + 8 * 32 if len(header) == BLOCK else -1
        try:
            size = int(header[124:136].rstrip(b" \0"), 8)
            is_intact = checksum == int(header[148:156].rstrip(b" \0"), 8)
            name = header[:100].rstrip(b"\0").decode("utf-8")
        except ValueError:
            return None
        is_plain = header[156:157] == b"0" and header[257:262] == b"ustar" and header[345:346] == b"\0"
        start = position + BLOCK
        if not (is_intact and is_plain) or size < 0 or start + size > len(content):
            return None
        members.append((name, content[start : start + size]))
        position = start + -(-size // BLOCK) * BLOCK
    return members


def _any_members(content: bytes) -> list[tuple[str, bytes]]:
    members = []
    last_offset = -1
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                raise ValueError(f"{member.name!r} is not an ordinary file")
            if member.size < 0 or member.offset <= last_offset:  # a forged size can send tarfile round in a circle
                raise ValueError(f"{member.name!r} has an impossible size")
            last_offset = member.offset
            file = tar.extractfile(member)
            assert file is not None
            members.append((member.name, file.read()))
    return members
