"""What the results are compared with: dense attention, torch, transformers."""
