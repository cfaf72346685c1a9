"""A grid file → its cells. ``grid.load`` is where to begin; the syntax stands in ``scaling/grid/grid.py``."""

from scaling.grid.grid import Cell, DesignConfig, FitConfig, Grid, GridError, expand, load

__all__ = ["Cell", "DesignConfig", "FitConfig", "Grid", "GridError", "expand", "load"]
