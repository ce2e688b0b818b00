"""Layers: `NativeSparseAttention`, its compressors and rotary embedding, and a small language model around it."""
