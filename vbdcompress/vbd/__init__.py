"""Variational Bayesian Dropout: the mathematics. Knows no files and no command line."""
