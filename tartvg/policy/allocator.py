"""Keep freed memory in the process: on a CPU the same large buffers come and go in every step.

glibc gives large blocks back to the kernel at once, and the next step pays for every page again.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to reuse large blocks. Returns False where there is no such allocator; harmless there."""
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    limit = 2**31 - 1
    return bool(mallopt(_MMAP_THRESHOLD, limit) and mallopt(_TRIM_THRESHOLD, limit) and mallopt(_TOP_PAD, 64 << 20))
