"""Everything that touches vLLM: KV cache formats, scheduler, attention metadata, the pruned step."""
