"""Iterative layerwise pruning (LAMP, Lee et al., ICLR 2021)."""
