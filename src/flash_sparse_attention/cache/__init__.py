"""What models keep of the tokens that they have read: `nsa_cache` of a whole one, `layer_cache` of a layer."""

from .layer_cache import Branches, LayerCache, Step
from .nsa_cache import FEW_TOKENS, NSACache

__all__ = ["FEW_TOKENS", "Branches", "LayerCache", "NSACache", "Step"]
