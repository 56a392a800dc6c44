"""File names as text that JSON can hold.

A name on Linux is any run of bytes without NUL and slash (path_resolution(7)); JSON holds Unicode only.
A name that is valid UTF-8 stands in a manifest as it is. In any other name each byte that is not part of
valid UTF-8 stands as U+0000 followed by its two hexadecimal digits: no name can hold NUL, so the form is
unambiguous, and the file stays valid UTF-8.
"""

import os
import re
import sys

UTF8_FILE_SYSTEM = sys.getfilesystemencoding().lower().replace("-", "") == "utf8"
_SURROGATE = re.compile("[\udc80-\udcff]")
_ESCAPED_BYTE = re.compile("\0([89a-f][0-9a-f])")


def to_text(name: str) -> str:
    """Return the form for manifests of a name or path as `os` functions return it (surrogateescape)."""
    if not UTF8_FILE_SYSTEM:
        name = os.fsencode(name).decode("utf-8", "surrogateescape")
    if name.isascii():
        return name
    return _SURROGATE.sub(lambda match: f"\0{ord(match[0]) - 0xDC00:02x}", name)


def from_text(text: str) -> str:
    """Return the name or path, as `os` functions take it, of its form in a manifest.

    Raises ValueError for a NUL that escapes no byte.
    """
    if "\0" in text:
        text = _ESCAPED_BYTE.sub(lambda match: chr(0xDC00 + int(match[1], 16)), text)
        if "\0" in text:
            raise ValueError("NUL that is not followed by the two hexadecimal digits of a byte from 80 to ff")
    if not UTF8_FILE_SYSTEM:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    return text
