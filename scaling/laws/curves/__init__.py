"""Fits laws of whole loss curves under a learning-rate schedule."""
