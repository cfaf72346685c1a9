"""Carries a plan out: tasks, the executors that run them, what a person sees meanwhile."""
