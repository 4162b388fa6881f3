"""Hugging Face directories: hub, tokenizer, safetensors."""
