"""Declares what a law is, and the catalogue of them."""
