"""Everything that makes the demo model: its world, tokenizer, training and export.

Nothing in here is imported by ``metok_vllm``; it needs torch, transformers, tokenizers, numpy and PyAV only.
"""
