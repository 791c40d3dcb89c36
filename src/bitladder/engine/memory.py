"""How much main memory there is."""

import os


def main_memory() -> int:
    """Bytes of main memory, 0 if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
