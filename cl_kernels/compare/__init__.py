"""Prompts or full fine-tuning? The evidence for one's own images and backbone, and a decision that may be "too close"."""
