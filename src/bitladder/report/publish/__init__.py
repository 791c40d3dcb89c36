"""Publishing a run directory: what of it goes to the hub, and whether it may."""

from bitladder.report.publish.checks import check_private, default_file, warnings
from bitladder.report.publish.contents import Entry, contents, groups

__all__ = ["Entry", "check_private", "contents", "default_file", "groups", "warnings"]
