"""Answers what fits are made for: allocation, forecasts, IsoFLOP minima, comparisons, coverage, truth."""
