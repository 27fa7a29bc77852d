"""Recognise files that were not downloaded or unpacked: Git LFS pointers, HTML pages, archives."""

_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive",
}
_TAR_MAGIC = slice(257, 262)


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins like this is a Git LFS pointer."""
    return head.startswith(b"version https://git-lfs")


def is_html(head: bytes) -> bool:
    """Whether a file that begins like this is a page, as a refused download leaves it."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml"))


def is_archive(head: bytes) -> bool:
    """Whether a file is an archive, by its first 512 bytes."""
    return head.startswith(tuple(_ARCHIVES)) or head[_TAR_MAGIC] == b"ustar"


def found_instead(head: bytes) -> str | None:
    """What a file that was not downloaded or unpacked is, and what to do; None for anything else."""
    if is_lfs_pointer(head):
        return "it is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if is_html(head):
        return "it is an HTML page, as a refused download leaves it: download the file again"
    if head.startswith(b"PK") and b"/data.pkl" in head[:256]:
        return "it is a torch checkpoint"
    if is_archive(head):
        kind = next((name for start, name in _ARCHIVES.items() if head.startswith(start)), "a tar archive")
        return f"it is {kind}: unpack it"
    return None
