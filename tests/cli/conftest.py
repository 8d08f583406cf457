"""The trained checkpoint and the command line."""

from trained import copy, folder, process, start, surgeon, text, without_bos

__all__ = ["copy", "folder", "process", "start", "surgeon", "text", "without_bos"]
