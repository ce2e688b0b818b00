"""Layers: `NativeSparseAttention`, its compressors and rotary embedding, and a small language model around it."""

from .attention import AttentionRecord, NativeSparseAttention, record_attention
from .compressors import Compressor
from .language_model import LanguageModel, LanguageModelConfig

__all__ = [
    "AttentionRecord",
    "Compressor",
    "LanguageModel",
    "LanguageModelConfig",
    "NativeSparseAttention",
    "record_attention",
]
