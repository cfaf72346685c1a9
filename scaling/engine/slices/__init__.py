"""Compiles for machines that are not here, and finds the mesh that fits them."""
