"""Iterative layerwise pruning (LAMP, Lee et al., ICLR 2021)."""
import utils  # noqa: F401  (it says which packages are missing)
