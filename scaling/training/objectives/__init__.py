"""Objectives: what a batch is made of, and the loss that a law is of."""
