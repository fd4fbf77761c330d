"""How host memory is allocated from the system and returned to it."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
KEEP = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0}
GIVE_BACK = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}  # glibc's defaults


def keep_freed_memory(keep: bool = True) -> None:
    """Reuse the pages of freed host tensors for the next ones.

    By default glibc returns the memory of each large tensor to the system and requests new pages for the next one,
    which the system zeroes first. With this the process never shrinks. Other C libraries are left as they are.

    Args:
        keep: False restores glibc's default.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for parameter, value in (KEEP if keep else GIVE_BACK).items():
            library.mallopt(parameter, value)
