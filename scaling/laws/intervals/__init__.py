"""Says how far data determine a fit: what residuals share, draws, profiles, the runs that decide."""
