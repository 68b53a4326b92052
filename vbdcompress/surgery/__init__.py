"""Editing of networks: what goes together, and how to cut it out. Knows no Bayes."""
