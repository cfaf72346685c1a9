"""Fits a form to observations: coordinates, starts, solver, evidence."""
