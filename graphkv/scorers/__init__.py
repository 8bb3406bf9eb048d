"""Where the importance of a token comes from: one file a scorer, each `score(layer, kernels)`.

The catalogue (`graphkv.terms.catalogue.SCORERS`) names them; `scorer(name)` loads the file of that name.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, cast

import torch

from graphkv.terms.catalogue import SCORERS
from graphkv.terms.errors import unknown_name

if TYPE_CHECKING:
    from graphkv.kernels import Kernels
    from graphkv.layer import Layer

__all__ = ["Score", "scorer"]

Score = Callable[["Layer", "Kernels"], torch.Tensor]


def scorer(name: str) -> Score:
    """The scoring function of a name in the catalogue: float32 [Hkv, n], or [Hkv, n - w] where the window needs none."""
    if name not in SCORERS:
        raise unknown_name("scorer", name, SCORERS)
    return cast(Score, import_module(f"graphkv.scorers.{name}").score)
