"""Processor of Qwen2.5-VL: text, images and videos to a prompt."""
