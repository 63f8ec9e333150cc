"""Which document of a packed sequence a position belongs to."""

from torch import Tensor

from research.config import DataConfig
from research.data.prepare import PreparedData


def documents(data: PreparedData, config: DataConfig, ids: Tensor) -> Tensor | None:
    """`document_index` of ids (B, T) where the configuration masks documents; None where it does not."""
    return document_index(ids, data.end_of_text) if config.mask_documents else None


def document_index(ids: Tensor, end_of_text: int) -> Tensor:
    """ids int64 (B, T) -> int64 (B, T): the number of end-of-text tokens before each position of its sequence.

    The end token belongs to the document that it ends.  Sequences are cut out of a stream, so the first and the
    last document of each may be a part.
    """
    ended = (ids == end_of_text).long()
    return ended.cumsum(1) - ended
