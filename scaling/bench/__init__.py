"""Measures this machine: training by size, packs, start-up, tokenising, fits, and what intervals hold."""
