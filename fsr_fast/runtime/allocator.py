"""How the host's memory is taken from the system and given back."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
KEEP = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0}
GIVE_BACK = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}  # what glibc starts with


def keep_freed_memory(keep: bool = True) -> None:
    """Let the next tensor of the host have the pages of one that was freed.

    By itself glibc gives the memory of each large tensor back to the system and asks for new pages for the next one,
    which the system fills with zeros first. Kept, the process stays as large as it once was. Other C libraries are
    left as they are.

    Args:
        keep: false: as glibc does by itself.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for parameter, value in (KEEP if keep else GIVE_BACK).items():
            library.mallopt(parameter, value)
