"""What runs where: costs, packs, executors. Imports no JAX in the process that decides."""
