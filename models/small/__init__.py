"""A small Qwen2.5-VL that is trained here until it finds needles in long videos: data, training, evaluation."""
