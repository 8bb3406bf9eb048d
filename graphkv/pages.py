"""Pages of tokens: what a page is worth, and which tokens it holds. Values are float64, -inf where nothing competes."""

import math

import torch

__all__ = ["page_values", "sums", "tokens_of"]


def page_values(values: torch.Tensor, page_size: int, combine: str) -> torch.Tensor:
    """float64 [pages]: the mean or the largest of a page's values [n]; those at -inf do not count, -inf where all are."""
    pages = _paged(values, page_size, -math.inf)
    if combine == "max":
        return pages.amax(dim=1)
    counted = pages > -math.inf
    number = counted.sum(dim=1)
    mean = pages.masked_fill(~counted, 0.0).sum(dim=1) / number.clamp(min=1)
    return mean.masked_fill_(number == 0, -math.inf)


def sums(values: torch.Tensor, page_size: int) -> torch.Tensor:
    """float64 [pages]: the sum of a page's values [n]."""
    return _paged(values, page_size, 0.0).sum(dim=1)


def tokens_of(pages: torch.Tensor, page_size: int, num_tokens: int) -> torch.Tensor:
    """bool [n]: the tokens of the pages that `pages`, bool [pages], marks."""
    return pages.repeat_interleave(min(page_size, num_tokens))[:num_tokens]


def _paged(values: torch.Tensor, page_size: int, empty: float) -> torch.Tensor:
    """[pages, page_size], or [1, n] where a page is longer; the last page is filled up with `empty`."""
    page_size = min(page_size, values.shape[0])
    count = -(-values.shape[0] // page_size)
    padded = values.new_full((count * page_size,), empty)
    padded[: values.shape[0]] = values
    return padded.view(count, page_size)
