"""`graphkv inspect`: what a policy does with one prompt, step by step, as data and as a page to look at.

`record` computes it by the library's own functions, `write_page` makes one HTML file of it that needs no network.
"""

from graphkv.inspector.page import write_page
from graphkv.inspector.record import LayerRecord, Neighbors, PolicyRecord, RowRecord, record

__all__ = ["LayerRecord", "Neighbors", "PolicyRecord", "RowRecord", "record", "write_page"]
