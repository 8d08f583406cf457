"""Where a model keeps its weights: sites, entries, orientation, and models from disk."""

from .anatomy import Address, Anatomy, text_config
from .folder import Shards
from .load import Loaded, load_model
from .probe import prove
from .site import Entry, Region, Site
from .stream import StreamedAnatomy, open_stream
from .table import TABLE, Layout
from .view import Packing, WeightView, digest

__all__ = [
    "TABLE",
    "Address",
    "Anatomy",
    "Entry",
    "Layout",
    "Loaded",
    "Packing",
    "Region",
    "Shards",
    "Site",
    "StreamedAnatomy",
    "WeightView",
    "digest",
    "load_model",
    "open_stream",
    "prove",
    "text_config",
]
