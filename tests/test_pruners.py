"""Pruning rules: answers worked out by hand, and properties over random networks, amounts and iterations."""
from __future__ import annotations

import random
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import main
from iclr2021_solution import iterate
from iclr2021_solution.tools.pruners import PRUNERS, weight_pruner_loader
from utils import checkpoint, stage1
from utils import pruning as pruners
from utils.analysis_utils import (
    GRADIENT_KINDS,
    Evidence,
    count_pruned_params,
    get_masks,
    has_masks,
    prunable_layers,
    set_masks,
)
from utils.common import UserError, derive_seed, needed, needs
from utils.pruning import make_pruner
from utils.run import open_run
from utils.selection import exact_k_masks
from utils.training import PRETRAIN, RECIPES


def network(*weights: torch.Tensor | list) -> nn.Sequential:
    """A layer per weight: Conv2d for four dimensions, Linear for two. Only pruned here, never run."""
    layers = []
    for weight in (torch.as_tensor(w, dtype=torch.float32) for w in weights):
        out, inputs, *kernel = weight.shape
        layer = nn.Conv2d(inputs, out, kernel, bias=False) if kernel else nn.Linear(inputs, out, bias=False)
        layer.weight = nn.Parameter(weight.clone())
        layers.append(layer)
    return nn.Sequential(*layers)


def random_network(seed: int, levels: int = 0) -> nn.Sequential:
    """Up to four random layers; weights from few distinct values if levels is given."""
    pick, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes = [(pick.randint(1, 8), pick.randint(1, 6), 3, 3) for _ in range(pick.randint(1, 3))]
    shapes.append((pick.randint(2, 10), pick.randint(2, 20)))
    if levels:
        return network(*(torch.randint(-levels, levels + 1, shape, generator=rng) for shape in shapes))
    return network(*(torch.randn(shape, generator=rng) * pick.choice([0.1, 1, 3]) for shape in shapes))


def ones(model: nn.Module) -> Evidence:
    """Gradients of 1 everywhere, for rules that look at them: SNIP then goes by |w|."""
    equal = {name: torch.ones_like(layer.weight) for name, layer in prunable_layers(model).items()}
    return Evidence(**dict.fromkeys(GRADIENT_KINDS, equal))


def keep_exactly(model: nn.Module, name: str, keep: int, seed: int = 0) -> None:
    """Prune so that `keep` weights stay, as a schedule towards a target does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        amount = 1 - keep / count_pruned_params(model).surviving
        weight_pruner_loader(name)(model, amount, seed=seed, evidence=ones(model))


def survivors(model: nn.Module) -> list[int]:
    return [int(mask.sum()) for mask in get_masks(model).values()]


def kept(model: nn.Module) -> list[list[int]]:
    """Flat positions that survive, per layer."""
    return [mask.flatten().nonzero().flatten().tolist() for mask in get_masks(model).values()]


# ---- each rule by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["magnitude", "glob"])
def test_magnitude_keeps_the_largest_of_the_whole_network(name):
    model = network([[0.5, -3.0], [1.0, 0.2]], [[2.0, -1.0]])
    keep_exactly(model, name, 3)  # 3, 2, and of the two ones the first
    assert kept(model) == [[1, 2], [0]]
    assert model[0].weight.tolist() == [[0.0, -3.0], [1.0, 0.0]]
    assert model[0].weight_orig.tolist()[0][0] == 0.5


@pytest.mark.parametrize(
    ("keep", "expected"), [(1, [[0], []]), (2, [[0], [0]]), (3, [[0], [0, 1]]), (4, [[0, 2], [0, 1]]),
                           (5, [[0, 2], [0, 1, 2]]), (6, [[0, 1, 2], [0, 1, 2]])]
)
def test_lamp_by_hand(keep, expected):
    # first layer, squares 9 1 4 0: 9/9 = 1, 4/(9+4) = 0.308, 1/(9+4+1) = 0.071, 0
    # second layer, squares 4 4 1: the two equal ones share 4/(4+4) = 0.5, 1/(4+4+1) = 0.111
    # order: 1 | 0.5 0.5 | 0.308 | 0.111 | 0.071 | 0; magnitude would take the first layer's 1 before the second's
    model = network([[3.0, -1.0], [2.0, 0.0]], [[-2.0, 2.0, 1.0]])
    keep_exactly(model, "lamp", keep)
    assert kept(model) == expected


def test_lamp_scores_by_hand():
    scores = pruners._lamp_scores(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    assert scores.tolist() == pytest.approx([1, 4 / 13, 1 / 14, 0])
    assert pruners._lamp_scores(torch.tensor([2.0, 2.0, 1.0])).tolist() == pytest.approx([0.5, 0.5, 1 / 9])
    assert pruners._lamp_scores(torch.zeros(3)).tolist() == [0, 0, 0]


def test_lamp_counts_only_surviving_weights():
    model = network([[3.0, 2.0, 2.0]], [[4.0, 2.0, 1.0]])
    set_masks(model, {"0": torch.tensor([[0, 1, 1]])})
    # first: without the pruned 3, 4/8 = 0.5 each (with it, 4/17 = 0.235); second: 1, 4/20 = 0.2, 1/21
    keep_exactly(model, "lamp", 3)
    assert kept(model) == [[1, 2], [0]]
    model[0].weight_orig.data[0, 0] = 100.0  # a pruned weight's value counts for nothing
    keep_exactly(model, "lamp", 2)  # 1 and the first 0.5
    assert kept(model) == [[1], [0]]


def test_unif_by_hand():
    model = network(torch.arange(1.0, 11).view(2, 5), torch.arange(1.0, 6).view(1, 5))
    keep_exactly(model, "unif", 9)  # 9/15 of 10 and of 5
    assert kept(model) == [[4, 5, 6, 7, 8, 9], [2, 3, 4]]
    keep_exactly(model, "unif", 4)  # 4/9 of 6 and 3: 2.67 and 1.33, rounded to 3 and 1
    assert kept(model) == [[7, 8, 9], [4]]


@pytest.mark.parametrize(("keep", "expected"), [(12, [2, 3, 7]), (8, [2, 2, 4]), (7, [2, 1, 4]), (6, [2, 0, 4])])
def test_unifplus_by_hand(keep, expected):
    # sizes 2, 10, 20: the first stays dense, the last keeps at least 4
    # 12: 10 left for 10 and 20: 3.33 and 6.67, so 3 and 7; 8: 6 left: 2 and 4
    # 7: 5 left: 1.67 and 3.33, so 2 and 3, which is under 4: 1 and 4
    model = network(torch.rand(2, 1, 1, 1), torch.rand(5, 2), torch.rand(4, 5))
    keep_exactly(model, "unifplus", keep)
    assert survivors(model) == expected


def test_unifplus_says_the_highest_sparsity_it_reaches():
    model = network(torch.rand(2, 1, 1, 1), torch.rand(5, 2), torch.rand(4, 5))
    # 1 - 6/32 and 1 - 5/32
    with pytest.raises(UserError, match=r"keeps 0 dense and 20 % of 2, .* at most 0.8125 here, not 0.8438"):
        keep_exactly(model, "unifplus", 5)
    assert not has_masks(model)
    # 1 - 7/38 is 0.81579: cut, not rounded, so that what the message names is within reach
    with pytest.raises(UserError, match=r"at most 0.8157 here"):
        keep_exactly(network(torch.rand(2, 1, 1, 1), torch.rand(6, 2), torch.rand(4, 6)), "unifplus", 5)


def test_unifplus_keeps_the_first_convolution_dense_even_behind_a_linear():
    model = network(torch.rand(4, 5), torch.rand(2, 2, 1, 1), torch.rand(5, 2))
    keep_exactly(model, "unifplus", 10)  # 4, then 6 over 20 and 10: 4 and 2, which is the last's floor too
    assert survivors(model) == [4, 4, 2]


def test_unifplus_rounds_the_last_layers_floor_up():
    model = network(torch.rand(1, 1, 1, 1), torch.rand(10, 10), torch.rand(2, 3))
    keep_exactly(model, "unifplus", 5)  # 20 % of 6 is 1.2: 2
    assert survivors(model) == [1, 2, 2]


@pytest.mark.parametrize(("keep", "expected"), [(24, [8, 11, 5]), (12, [4, 6, 2]), (30, [8, 16, 6])])
def test_erk_by_hand(keep, expected):
    # counts are proportional to the sums of dimensions 4+2+1+1 = 8, 6+5 = 11, 2+3 = 5; capacities 8, 30, 6
    # 12: 4, 5.5, 2.5: the one left goes to the first of the equal remainders
    # 30: 10 is over 8; 22 left: 15.1 and 6.9, over 6; 16 left for the second
    model = network(torch.rand(4, 2, 1, 1), torch.rand(6, 5), torch.rand(2, 3))
    keep_exactly(model, "erk", keep)
    assert survivors(model) == expected


def test_random_is_nested_seeded_and_uniform():
    one_shot, iterative, other = (network(torch.rand(40, 50), torch.rand(10, 200)) for _ in range(3))
    for keep in (3000, 1700, 400):
        keep_exactly(iterative, "random", keep, seed=5)
    keep_exactly(one_shot, "random", 400, seed=5)
    keep_exactly(other, "random", 400, seed=6)
    assert kept(iterative) == kept(one_shot) != kept(other)
    assert all(150 < count < 250 for count in survivors(one_shot))  # 200 expected of each, sd 9


def test_random_ignores_the_global_generator():
    before = torch.random.get_rng_state()
    keep_exactly(network(torch.rand(4, 5)), "random", 7)
    torch.random.set_rng_state(before)
    first, second = network(torch.ones(4, 5)), network(torch.ones(4, 5))
    keep_exactly(first, "random", 7)
    torch.rand(10)
    keep_exactly(second, "random", 7)
    assert kept(first) == kept(second)


BY_MAGNITUDE = ["magnitude", "glob", "lamp", "unif", "unifplus", "erk"]  # within a layer, by definition


def test_the_rule_of_the_module_docstring_can_be_added(monkeypatch):
    example = [line for line in pruners.__doc__.splitlines() if line.startswith("    ")]
    monkeypatch.setattr(pruners, "PRUNERS", dict(PRUNERS))
    exec("\n".join(line.removeprefix("    ") for line in example), vars(pruners))
    model = network([[0.5, -3.0], [1.0, 0.2]], [[-2.0, -1.0]])
    keep_exactly(model, "positive", 3)
    assert kept(model) == [[0, 2, 3], []]


def test_snip_keeps_the_largest_products_of_weight_and_gradient():
    """y = sum of W x for x = (1, 10): dy/dW = (1, 10) in each row, so |g w| = 0.5, 30, 1, 2."""
    model = network([[0.5, -3.0], [1.0, 0.2]])
    made = []

    def gradient():
        made.append(1)
        model(torch.tensor([[1.0, 10.0]])).sum().backward()
        return {name: layer.weight.grad for name, layer in prunable_layers(model).items()}
    weight_pruner_loader("magnitude")(model, 0.25, evidence=Evidence(gradient=gradient))
    assert not made and kept(model) == [[0, 1, 2]]  # a rule of the weights alone computes nothing
    model = network([[0.5, -3.0], [1.0, 0.2]])
    weight_pruner_loader("snip")(model, 0.5, evidence=Evidence(gradient=gradient))
    assert made == [1] and kept(model) == [[1, 3]]


def test_a_rule_that_looks_at_data_says_what_it_lacks():
    model = network([[0.5, -3.0], [1.0, 0.2]])
    with pytest.raises(UserError, match=r"give evidence=Evidence\(gradient="):
        weight_pruner_loader("snip")(model, 0.5)
    assert not has_masks(model)


@pytest.mark.parametrize("rule", [lambda layers, keep, seed: [torch.ones_like(mask) for mask in layers.alive],
                                  lambda layers, keep, seed: [torch.zeros_like(mask) for mask in layers.alive],
                                  lambda layers, keep, seed: exact_k_masks([-w for w in layers.magnitudes], keep)])
def test_a_rule_that_keeps_another_number_or_revives_weights_is_refused(rule):
    model = network([[0.5, -3.0], [1.0, 0.2]])
    weight_pruner_loader("magnitude")(model, 0.25)  # 0.2 goes, which the last rule would take first
    with pytest.raises(UserError, match="this pruning rule is wrong: it keeps .* where 2 of those"):
        make_pruner(rule)(model, 0.4)
    assert kept(model) == [[0, 1, 2]]


def test_every_sparsity_of_a_run_is_tried_before_any_training(image_folder, tmp_path, monkeypatch):
    """A rule that reaches 0.9 alone: 0.5, which comes first, is refused before the dense model is trained."""
    def only_far(layers, keep, seed):
        if keep > 0.2 * sum(layers.totals):
            raise UserError("this rule begins at 0.8")
        return exact_k_masks(layers.magnitudes, keep, layers.alive)
    monkeypatch.setitem(PRUNERS, "only_far", only_far)
    with pytest.raises(UserError, match="begins at 0.8"):
        main.main(["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--max_epochs", "1",
                   "--pruner", "only_far", "--sparsity", "0.5", "0.9"])
    assert not list(tmp_path.rglob("*.pth"))


def test_rules_may_look_at_every_kind_of_gradient_evidence_in_the_scripts(image_folder, tmp_path, monkeypatch):
    seen = {}

    @needs("saliency", "gradient")
    def watching(layers, keep, seed):
        seen.update({kind: layers.evidence.tensor(kind, layers.names[-1]) for kind in needed(watching)})
        return exact_k_masks(layers.magnitudes, keep, layers.alive)
    monkeypatch.setitem(PRUNERS, "watching", watching)
    main.main(["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
               "--max_epochs", "1", "--finetune_epochs", "0", "--pruner", "watching", "--sparsity", "0.9"])
    assert (seen["saliency"] >= 0).all() and seen["saliency"].shape == seen["gradient"].shape == (10, 64)
    assert not torch.equal(seen["saliency"], seen["gradient"]) and (seen["saliency"] > 0).any()


def test_snip_from_the_script_is_that_of_the_balanced_sample(image_folder, tmp_path):
    """Against |g w| computed here from the sample that every evidence comes from, one batch at a time."""
    words = ["--m_name", "resnet20", "--data_dir", str(image_folder), "--root", str(tmp_path), "--device", "cpu",
             "--max_epochs", "1", "--finetune_epochs", "0", "--val_split", "0.25", "--precision", "fp32"]
    main.main([*words, "--pruner", "snip", "--sparsity", "0.9"])
    run = open_run(main.parse_args(words))
    model = stage1.load_outcome(run, checkpoint.dense_path(tmp_path, "resnet20")).model.eval()
    sample = run.train.balanced_sample(6_400, 128, derive_seed(0, "evidence"))
    (inputs, targets), = list(sample)  # 60 images or fewer: one batch
    torch.nn.functional.cross_entropy(model(inputs), targets).backward()
    weights = [layer.weight for layer in prunable_layers(model).values()]
    scores = torch.cat([(weight * weight.grad).abs().flatten() for weight in weights])
    pruned = stage1.load_outcome(run, checkpoint.pruned_path(tmp_path, "resnet20", 0.9)).model
    mask = torch.cat([kept.flatten() for kept in get_masks(pruned).values()])
    assert int(mask.sum()) == 27_090 and scores[mask].min() >= scores[~mask].max()


# ---- properties of all rules ----------------------------------------------------------------------------------------


def shuffle_weights(model: nn.Module, pick: random.Random) -> list[torch.Tensor]:
    """Move the weights of every layer around, so that pruned positions may hold the largest; returns a copy."""
    weights = [getattr(layer, "weight_orig", layer.weight) for layer in prunable_layers(model).values()]
    for weight in weights:
        weight.data.copy_(weight.data.flatten()[pick.sample(range(weight.numel()), weight.numel())].view(weight.shape))
    return [weight.detach().clone() for weight in weights]


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("levels", [0, 2])
def test_counts_are_exact_and_nothing_returns(name, levels):
    for seed in range(12):
        model, pick = random_network(seed, levels), random.Random(seed)
        for _ in range(4):
            weights = shuffle_weights(model, pick)
            before, left = get_masks(model), count_pruned_params(model).surviving
            amount = pick.choice([0.1, 0.4, 0.5, pick.random()])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    weight_pruner_loader(name)(model, amount, evidence=ones(model))
            except UserError:
                assert name == "unifplus"
                break
            assert count_pruned_params(model).surviving == round((1 - amount) * left)
            assert not any((mask & ~before[layer]).any() for layer, mask in get_masks(model).items())
            for layer, weight in zip(prunable_layers(model).values(), weights, strict=True):
                assert torch.equal(layer.weight_orig, weight)  # values are left alone


@pytest.mark.parametrize("name", PRUNERS)
def test_all_equal_weights_still_give_exactly_k(name):
    for keep in (36, 55, 99):
        model = network(torch.ones(3, 1, 3, 3), torch.ones(8, 5), torch.ones(5, 8))
        keep_exactly(model, name, keep)
        assert sum(survivors(model)) == keep


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("levels", [0, 2])
def test_masks_depend_on_weights_and_seed_alone(name, levels):
    masks = []
    for draws in (1, 2, 3):
        model = random_network(3, levels)
        torch.manual_seed(draws)
        for share in (0.7, 0.5):
            keep_exactly(model, name, round(share * count_pruned_params(model).total), seed=4)
        masks.append(kept(model))
    assert masks[0] == masks[1] == masks[2]


@pytest.mark.parametrize("name", BY_MAGNITUDE)
def test_within_a_layer_the_largest_magnitudes_survive(name):
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        model = network(*(torch.randn(shape, generator=rng) for shape in [(2, 1, 3, 3), (6, 5, 3, 3), (10, 20)]))
        keep_exactly(model, name, 100 + 30 * seed)
        for layer in prunable_layers(model).values():
            alive, size = layer.weight_mask.bool(), layer.weight_orig.abs()
            if alive.any() and not alive.all():
                assert size[alive].min() >= size[~alive].max()


def naive_lamp(model: nn.Module, keep: int) -> list[list[int]]:
    """Straight from the definition, element by element."""
    ranked = []
    for i, layer in enumerate(prunable_layers(model).values()):
        square = (layer.weight_orig if has_masks(model) else layer.weight).detach().double().flatten() ** 2
        alive = list(get_masks(model).values())[i].flatten()
        for position in alive.nonzero().flatten().tolist():
            above = square[alive & (square >= square[position])].sum()
            ranked.append((-float(square[position] / above) if square[position] else 0.0, i, position))
    best = sorted(ranked)[:keep]
    return [sorted(position for _, i, position in best if i == layer) for layer in range(len(prunable_layers(model)))]


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("seed", range(10))
def test_lamp_agrees_with_its_definition(seed, levels):
    model = random_network(seed, levels)
    for fraction in (0.6, 0.3, 0.05):
        keep = round(fraction * count_pruned_params(model).total)
        expected = naive_lamp(model, keep)
        keep_exactly(model, "lamp", keep)
        assert kept(model) == expected


def test_an_amount_from_two_counts_gives_that_count():
    pick = random.Random(0)
    for _ in range(25):
        model = network(torch.rand(pick.randint(10, 60), 97))
        total = count_pruned_params(model).total
        first = pick.randint(2, total - 1)
        keep_exactly(model, "magnitude", first)
        second = pick.randint(1, first - 1)
        keep_exactly(model, "lamp", second)
        assert survivors(model) == [second]


def test_ten_iterations_end_at_exactly_the_target():
    model = network(torch.rand(30, 20, 3, 3), torch.rand(10, 30))
    total = count_pruned_params(model).total
    for i in range(1, 11):
        keep_exactly(model, "lamp", round(0.01 ** (i / 10) * total))
    assert count_pruned_params(model).surviving == round(0.01 * total)


def test_channels_last_prunes_the_same_weights():
    for name in PRUNERS:
        model, last = random_network(1, levels=3), random_network(1, levels=3).to(memory_format=torch.channels_last)
        for keep in (85, 70):
            keep_exactly(model, name, keep)
            keep_exactly(last, name, keep)
        assert kept(model) == kept(last)


# ---- what users see -------------------------------------------------------------------------------------------------


def test_an_empty_layer_is_reported_by_name_where_the_pruner_was_called():
    model = network([[9.0, 8.0]], [[0.1, 0.2]])
    with pytest.warns(UserWarning, match="no weight is left in layer 1:") as caught:
        weight_pruner_loader("magnitude")(model, 0.5)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight_pruner_loader("unif")(network([[9.0, 8.0]], [[0.1, 0.2]]), 0.5)


@pytest.mark.parametrize("amount", [0, 1, -0.1, 1.5, 99, float("nan")])
def test_amounts_outside_0_1_are_refused(amount):
    model = network(torch.rand(3, 3))
    with pytest.raises(UserError, match="not a fraction between 0 and 1"):
        weight_pruner_loader("lamp")(model, amount)
    assert not has_masks(model)


def test_an_unknown_pruner_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=f"'no such'; known are {', '.join(PRUNERS)}"):
        weight_pruner_loader("no such")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model = network([[1.0, 2.0]], [[3.0, value]])
    with pytest.raises(UserError, match="layer 1 has weights that are not finite"):
        weight_pruner_loader("lamp")(model, 0.5)
    assert not has_masks(model)


@pytest.mark.parametrize("words, expected", [([], PRETRAIN), (["--max_epochs", "7"], replace(PRETRAIN, epochs=7))])
def test_iterate_takes_a_dense_model_of_another_recipe_whose_card_leaves_out_usual_values(words, expected, tmp_path):
    dense = checkpoint.dense_path(tmp_path, "resnet20")
    checkpoint.save_checkpoint({}, dense)
    card = {"sha256": checkpoint.file_digest(dense), "config": {"recipe": PRETRAIN.as_dict()}}
    checkpoint.save_json(card, checkpoint.card_path(dense))
    args = iterate.parse_args(["--model", "resnet20", "--recipe", "short", *words])
    run = SimpleNamespace(root=tmp_path, m_name="resnet20")
    assert iterate.dense_settings(run, args, RECIPES["short"].pretrain) == (expected, False)
