"""Prompts or full fine-tuning? Evidence from one's own images and backbone, and a decision that may be "too close"."""
