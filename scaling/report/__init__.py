"""Sets answers in type: page, figures, terminal. Computes none."""
