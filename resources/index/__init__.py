"""The index: exact inner-product search over immutable FAISS segments."""

from prism_assets.resources.index.search import SegmentedIndex, TopK
from prism_assets.resources.index.segments import SegmentPart
from prism_assets.resources.index.store import VectorStore

__all__ = ["SegmentPart", "SegmentedIndex", "TopK", "VectorStore"]
