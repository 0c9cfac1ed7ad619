"""Reads LLaVA checkpoints in the format of their authors (`LlavaQwenForCausalLM`), as published: the config,
the tokenizer, the processors and the names of the weights.
"""
