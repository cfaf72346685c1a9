"""Laws, fitted with evidence: float64 NumPy throughout; needs no accelerator and imports no training code."""
