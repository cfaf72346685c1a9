"""What to do, by a fitted law: each question answered with an interval, and how far beyond the fit it lies."""
