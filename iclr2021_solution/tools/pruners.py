"""The published face of the pruning rules, `weight_pruner_loader(name)`; they themselves are in `utils.pruning`."""
from utils.pruning import PRUNERS, Layers, Pruner, Rule, make_pruner, weight_pruner_loader

__all__ = ["PRUNERS", "Layers", "Pruner", "Rule", "make_pruner", "weight_pruner_loader"]
