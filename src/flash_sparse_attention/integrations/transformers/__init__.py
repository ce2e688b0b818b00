"""Sparse attention for models of transformers: Llama, Mistral, Qwen2, Qwen3 and others with the same attention.

    from flash_sparse_attention.integrations.transformers import convert

    model = convert("Qwen/Qwen3-0.6B")            pretrained weights, sparse attention
    warm_up(model, batches)                       what is new learns to give what was there before
    model.save_pretrained("qwen3-nsa")
    AutoModelForCausalLM.from_pretrained("qwen3-nsa")

Importing this module registers the classes with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from __future__ import annotations

from ...validation import bad

try:
    import transformers
except ImportError as error:
    cure = "pip install 'flash-sparse-attention[hf]'"
    raise ImportError(str(bad("transformers", "installed, version 5 or later", "none", cure))) from error

from .attention import NSAAttention
from .cache import SparseCacheLayer, SparseCaches
from .configuration import START_OF_GATES, conversion_config
from .conversion import convert
from .matching import Matching, WarmUpRecord, matching, warm_up
from .modeling import SparseClasses, sparse_classes

if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(str(bad("transformers", "version 5 or later", transformers.__version__)))

NSALlamaConfig, NSALlamaModel, NSALlamaForCausalLM = sparse_classes("llama")
NSAMistralConfig, NSAMistralModel, NSAMistralForCausalLM = sparse_classes("mistral")
NSAQwen2Config, NSAQwen2Model, NSAQwen2ForCausalLM = sparse_classes("qwen2")
NSAQwen3Config, NSAQwen3Model, NSAQwen3ForCausalLM = sparse_classes("qwen3")

__all__ = [
    "START_OF_GATES",
    "Matching",
    "NSAAttention",
    "NSALlamaConfig",
    "NSALlamaForCausalLM",
    "NSALlamaModel",
    "NSAMistralConfig",
    "NSAMistralForCausalLM",
    "NSAMistralModel",
    "NSAQwen2Config",
    "NSAQwen2ForCausalLM",
    "NSAQwen2Model",
    "NSAQwen3Config",
    "NSAQwen3ForCausalLM",
    "NSAQwen3Model",
    "SparseCacheLayer",
    "SparseCaches",
    "SparseClasses",
    "WarmUpRecord",
    "conversion_config",
    "convert",
    "matching",
    "sparse_classes",
    "warm_up",
]
