"""Tabular bandit simulator: how the sampler of response pairs sets the convergence rate of online DPO."""
