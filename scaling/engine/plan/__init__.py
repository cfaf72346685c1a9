"""Computes what a sweep will do before it does any of it: packs, trunks, times, costs, doubts."""
