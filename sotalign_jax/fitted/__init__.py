"""Aligners that are fitted in one go, without training steps."""
