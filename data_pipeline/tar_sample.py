"""The members of one sample from its part of a tar.

Reading never extracts to disk, and a link or device inside a tar is refused. What our own writer makes is parsed here,
many times as fast as by tarfile; anything else, and any doubt, is left to tarfile. Where images are not wanted, their
bytes are stepped over unread, as long as each has codes beside it: a document is the same either way but for its bytes.

Cost (run): 1.3 us a member, and 1.4 us for each piece that is read of a local file in the page cache.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable

from data_pipeline.schema import Document, Rejected, codes_name

BLOCK = 512  # bytes; a tar consists of such blocks
HEADER = struct.Struct("100s 24x 12s 12x 8s c 100x 5s 83x c 166x")  # name, size, checksum, kind, "ustar", prefix
TEXT_AND_CODES = ("json", ".npy")  # how the names of these members end
MAX_SAMPLE_BYTES = 1 << 30  # a sample is held in memory; what an index claims must not ask for all of it
STEP = 4096  # bytes read at once where images are stepped over: a header with codes or texts and the next header

Read = Callable[[int, int], bytes]  # bytes [start, end) of the sample
Members = tuple[str, dict[str, bytes]]  # key, suffix -> content


def read_sample(place: str, content: bytes) -> Document | Rejected:
    """A document from the tar bytes of one sample; `place` names it where it has no key."""
    members = read_members(place, len(content), lambda start, end: content[start:end])
    return members if isinstance(members, Rejected) else Document.from_members(*members)


def too_large(place: str, size: int) -> Rejected | None:
    """The refusal of a sample of more than MAX_SAMPLE_BYTES; to be asked before it is read as a whole."""
    if size <= MAX_SAMPLE_BYTES:
        return None
    return Rejected(place, f"sample is too large: {size:,} bytes, more than {MAX_SAMPLE_BYTES:,}")


def read_members(place: str, size: int, read: Read, images: bool = True) -> Members | Rejected:
    """Key and members of the sample of `size` bytes behind `read`. `images=False` leaves out images that have codes,
    unread where possible."""
    refused = too_large(place, size)
    if refused is not None:
        return refused
    found = _members(place, size, read, images)
    if images or isinstance(found, Rejected):
        return found
    key, by_suffix = found
    pictures = [name for name in by_suffix if not name.endswith(TEXT_AND_CODES)]
    left_out = [name for name in pictures if codes_name(name) in by_suffix]
    if len(left_out) < len(pictures):
        found = _members(place, size, read, images=True)  # an image without codes is wanted, and rare
        if isinstance(found, Rejected):
            return found
        by_suffix = found[1]
    for name in left_out:
        del by_suffix[name]
    return key, by_suffix


def _members(place: str, size: int, read: Read, images: bool) -> Members | Rejected:
    """Without `images`, what is neither json nor codes may be empty."""
    members = _plain_members(size, read, images)
    if members is None:
        content = read(0, size)
        try:
            members = _any_members(content)
        except Exception as error:  # a damaged header shows as almost any error, and nothing here touches a disk
            return Rejected(place, f"tar cannot be read: {error}")
    by_suffix: dict[str, bytes] = {}
    keys: set[str] = set()
    for name, data in members:
        folder, slash, base = name.rpartition("/")
        key, _, suffix = base.partition(".")
        keys.add(folder + slash + key)
        if len(keys) > 1:
            break
        if suffix in by_suffix:
            return Rejected(place, f"a member comes twice: {name!r}")
        by_suffix[suffix] = data
    if len(keys) != 1:
        return Rejected(place, "sample holds no member or members of several keys")
    key = keys.pop()
    if any("\ud800" <= char <= "\udfff" for char in key):  # so tarfile gives bytes that it cannot decode
        return Rejected(place, f"member name is not valid UTF-8: {key!r}")
    return key, by_suffix


def _plain_members(size: int, read: Read, images: bool) -> list[tuple[str, bytes]] | None:
    """(name, data) of ordinary files with short names; None if there is anything else or any doubt, and tarfile
    decides. Without `images`, what is neither json nor codes comes empty."""
    step = size if images else STEP
    members = []
    position = 0  # of a header
    base, buffer = 0, b""  # what has been read last: bytes [base, base + len(buffer))
    while position < size:
        at = position - base
        if at + BLOCK > len(buffer):
            base, at, buffer = position, 0, read(position, min(position + step, size))
            if len(buffer) < BLOCK:
                return None
        name_bytes, length, checksum, kind, magic, prefix = HEADER.unpack_from(buffer, at)
        try:
            num_bytes = int(length.rstrip(b" \0"), 8)
            expected = int(checksum.rstrip(b" \0"), 8)
            name = name_bytes.rstrip(b"\0").decode()
        except ValueError:
            return None
        # The sum of all bytes, those of the checksum itself counted as spaces. The low half of Adler-32 is 1 + the sum
        # modulo 65,521, which a header of text stays below, and 20 times as fast as `sum`.
        total = (zlib.adler32(buffer[at : at + BLOCK]) & 0xFFFF) - 1
        is_intact = total - sum(checksum) + 8 * 32 == expected
        is_plain = kind == b"0" and magic == b"ustar" and prefix == b"\0"
        start = position + BLOCK
        end = start + num_bytes
        if not (is_intact and is_plain) or num_bytes < 0 or end > size:
            return None
        if not images and not name.endswith(TEXT_AND_CODES):
            members.append((name, b""))
        elif end <= base + len(buffer):
            members.append((name, buffer[start - base : end - base]))
        else:
            members.append((name, read(start, end)))
        position = start + -(-num_bytes // BLOCK) * BLOCK
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
        if content[tar.offset :].strip(b"\0"):  # tarfile takes a damaged header for the end of the tar
            raise ValueError("a header is damaged")
    return members
