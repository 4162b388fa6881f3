"""Checkpoints of Qwen2.5-VL: config.json, Hugging Face weights, orbax."""
