"""Vision tower of Qwen2.5-VL: patches of images and videos to tokens."""
