"""The choice of pairs, by enumeration of all reward patterns."""

import itertools
import math
import random
from collections import Counter

import pytest

from common.cli import UserError
from dpo_iteration.pairs import (
    CHOOSE_TYPES,
    PreferencePair,
    choose,
    choose_all,
    label_margin,
    noisy_margin,
    win_probability,
)

# Every pattern of ties and orders of four responses occurs among these 256.
PATTERNS = list(itertools.product(range(4), repeat=4))


def instance(rewards, pairs=None, responses=None, **more) -> dict:
    responses = responses or [f"text {i}" for i in range(len(rewards))]
    return {"prompt": "p", "responses": responses, "rewards": list(rewards), "pairs": pairs, **more}


def pick(choose_type, rewards, seed=0, pairs=None, penalty=0.0, **more):
    return choose(instance(rewards, pairs, **more), choose_type, random.Random(seed), penalty)


def kept_and_dropped(*arguments, **options):
    dropped = Counter()
    return list(choose_all(*arguments, dropped=dropped, **options)), dropped


@pytest.mark.parametrize("choose_type", CHOOSE_TYPES)
def test_every_choice_is_of_two_responses_by_the_seed_alone(choose_type):
    """What a new row of the table must do: two different indices or none, nothing but the generator decides."""
    for rewards, seed in itertools.product(PATTERNS, range(2)):
        scores, components = list(map(float, rewards)), [0, 1, 1, 0]
        found, again = (CHOOSE_TYPES[choose_type](scores, components, random.Random(seed)) for _ in range(2))
        assert found == again and (found is None or all(0 <= i < 4 for i in found))
        if found is not None and len(set(rewards)) == 4:
            assert found[0] != found[1]


@pytest.mark.parametrize("choose_type", CHOOSE_TYPES)
def test_chosen_is_better_or_the_prompt_is_dropped(choose_type):
    for rewards in PATTERNS:
        pair, why = pick(choose_type, rewards, pairs=[0, 1, 1, 0], implicit_rewards=[0.3, -0.1, 0.2, 0.0])
        if pair is None:
            assert why == "equal rewards"
        else:
            assert rewards[pair.chosen] - rewards[pair.rejected] == pair.difference > 0


@pytest.mark.parametrize("choose_type, rank", [("max_min", -1), ("max_max", 1)])
def test_ranks(choose_type, rank):
    """Best against worst or second best by the sorted rewards; dropped exactly where the two are equal."""
    for rewards in PATTERNS:
        ranked = sorted(rewards, reverse=True)
        pair, _ = pick(choose_type, rewards)
        assert (pair is None) == (ranked[0] == ranked[rank])
        if pair:
            assert (rewards[pair.chosen], rewards[pair.rejected]) == (ranked[0], ranked[rank])


def test_implicit_rewards_choose_and_rewards_label():
    for rewards in PATTERNS:
        pair, _ = pick("implicit_max_min", rewards, implicit_rewards=[0.2, 0.5, -0.5, 0.1])
        assert (pair is None) == (rewards[1] == rewards[2])
        if pair:
            assert {pair.chosen, pair.rejected} == {1, 2} and rewards[pair.chosen] > rewards[pair.rejected]


def test_equal_implicit_rewards_choose_any_two():
    """While the policy is the reference all are 0: the choice is then a random pair, not none."""
    rewards = (0.1, 0.4, 0.2, 0.3)
    seen = Counter(pick("implicit_max_min", rewards, seed, implicit_rewards=[0.0] * 4)[0][:2] for seed in range(600))
    assert set(seen) == {(i, j) for i, j in itertools.permutations(range(4), 2) if rewards[i] > rewards[j]}
    assert all(60 < count < 140 for count in seen.values())


def test_max_random_chooses_the_best():
    for rewards, seed in itertools.product(PATTERNS, range(3)):
        pair, _ = pick("max_random", rewards, seed)
        assert pair is None or rewards[pair.chosen] == max(rewards)


def test_random_types_reach_every_pair():
    """Over seeds, every admissible pair occurs, about equally often."""
    rewards, names = (0.1, 0.4, 0.2, 0.3), ("random", "max_random", "max_min", "max_max")
    seen = {name: Counter(pick(name, rewards, seed)[0][:2] for seed in range(1200)) for name in names}
    everything = {(i, j) for i in range(4) for j in range(4) if rewards[i] > rewards[j]}
    assert set(seen["random"]) == everything
    assert min(seen["random"].values()) > 140  # 200 each
    assert set(seen["max_random"]) == {(1, 0), (1, 2), (1, 3)}
    assert min(seen["max_random"].values()) > 320  # 400 each
    assert set(seen["max_min"]) == {(1, 0)} and set(seen["max_max"]) == {(1, 3)}


def test_seed_decides():
    rows = [instance([0, 1, 2, 3]) for _ in range(20)]
    first, again, other = (list(choose_all(rows, "f", "random", seed)) for seed in (1, 1, 2))
    assert [p for _, p in first] == [p for _, p in again] != [p for _, p in other]
    # A row's pair does not depend on how many rows stand before the end of the file.
    assert [p for _, p in choose_all(rows[:7], "f", "random", 1)] == [p for _, p in first[:7]]


def test_length_penalty_counts_tokens_and_enters_the_margin():
    rewards, tokens = [1.0, 0.9, 0.2], [100, 10, 5]
    pair, _ = pick("max_min_p", rewards, penalty=0.01, num_tokens=tokens)
    assert (pair.chosen, pair.rejected) == (1, 0)  # penalised: 0.0, 0.8, 0.15
    assert pair.difference == pytest.approx(0.8)
    pair, _ = pick("max_min_p", rewards, penalty=0.01, responses=["x" * n for n in tokens])
    assert (pair.chosen, pair.rejected) == (1, 0)


def test_identical_texts_are_no_pair():
    pair, why = pick("max_min", [1.0, 0.0], responses=["same", "same"])
    assert (pair, why) == (None, "identical responses")


@pytest.mark.parametrize("pairs", [[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 1], [2, 2, 2, 2]])
def test_mixed_max_min_stays_within_a_component(pairs):
    for rewards, seed in itertools.product(PATTERNS, range(4)):
        pair, why = pick("mixed_max_min", rewards, seed, pairs)
        if pair is None:
            assert why == "equal rewards"
            continue
        assert pairs[pair.chosen] == pairs[pair.rejected]
        inside = [r for r, c in zip(rewards, pairs, strict=True) if c == pairs[pair.chosen]]
        assert (rewards[pair.chosen], rewards[pair.rejected]) == (max(inside), min(inside))


def test_a_drawn_label_of_equal_rewards_is_of_one_component():
    """A fair coin between two responses of the component that was drawn, however many other responses are there."""
    components, rewards = [0, 0, 1, 1, 1], [1.0, 1.0, 2.0, 2.0, 2.0]
    rows = [instance(rewards, components)] * 200
    kept, _ = kept_and_dropped(rows, "f", "mixed_max_min", 0, label_seed=0)
    chosen = [(components[pair.chosen], components[pair.rejected], pair.chosen != pair.rejected) for _, pair in kept]
    assert set(chosen) == {(0, 0, True), (1, 1, True)}


def test_mixed_max_min_uses_every_component_in_proportion():
    """The published scripts forgot an offset: no pair ever came from the second component."""
    rng = random.Random(0)
    counts = Counter()
    for seed in range(2000):
        rewards = [rng.gauss(0, 1) for _ in range(10)]
        pair, _ = pick("mixed_max_min", rewards, seed, [0] * 3 + [1] * 7)
        counts[int(pair.chosen >= 3)] += 1
    assert counts[1] / 2000 == pytest.approx(0.7, abs=0.04)


def test_mixed_max_min_without_two_of_a_kind():
    assert pick("mixed_max_min", [0, 1], pairs=[0, 1]) == (None, "no component with two responses")
    pair, _ = pick("mixed_max_min", [9, 1, 2], pairs=[0, 1, 1])
    assert (pair.chosen, pair.rejected) == (2, 1)


def test_file_keeps_order_and_counts_what_it_drops():
    rows = [instance([0, 1]), instance([1, 1]), instance([1, 0]), instance([2, 1], responses=["a", "a"])]
    kept, dropped = kept_and_dropped(rows, "f", "max_min", 0)
    assert [(row is rows[0] or row is rows[2], pair.chosen) for row, pair in kept] == [(True, 1), (True, 0)]
    assert dropped == {"equal rewards": 1, "identical responses": 1}


def test_one_response_is_an_error_that_names_the_row():
    with pytest.raises(UserError, match=r"data\.json: row 1: one response"):
        list(choose_all([instance([0, 1]), instance([1])], "data.json", "max_min", 0))


def test_responses_are_told_apart_by_their_ids():
    """Equal texts of unequal ids make a pair; equal ids do not, whatever their texts are."""
    pair, _ = pick("max_min", [1.0, 0.0], responses=["same", "same"], response_ids=[[5], [5, 2]])
    assert pair[:2] == (0, 1)
    pair, why = pick("max_min", [1.0, 0.0], responses=["one", "other"], response_ids=[[5], [5]])
    assert (pair, why) == (None, "identical responses")


# --- Labels: the bandit's law, from its own definition ------------------------------------------------------------

MARGINS = [-700.0, -3.0, -0.1, 0.0, 0.5, 2.0, 40.0, 700.0]


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_win_probability_is_the_bandits(noise):
    from bandit.problem import make_bandit

    for margin in MARGINS:
        of_bandit = make_bandit([margin, 0.0], 1.0, label_noise=noise).win_margins[0, 0, 1]
        assert 2 * win_probability(margin, noise) - 1 == pytest.approx(of_bandit, abs=1e-12)
        assert win_probability(margin, noise) + win_probability(-margin, noise) == pytest.approx(1)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_noise_mixed_into_a_margin(noise):
    """The loss sees sigmoid(noisy margin): the mixture of the label and its opposite. Without noise: the margin."""
    for margin in MARGINS:
        mixed = noisy_margin(margin, noise)
        if noise == 0:
            assert mixed == margin
        else:
            assert 1 / (1 + math.exp(-mixed)) == pytest.approx(win_probability(margin, noise), rel=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_sampled_labels_follow_bradley_terry(noise):
    """Of 4,000 equal prompts the share that the better response wins; the seed decides."""
    rows = [instance([1.0, 0.25])] * 4000
    options = {"margin_scale": 2.0, "label_noise": noise}
    first, again, other = (
        [pair for _, pair in choose_all(rows, "f", "max_min", 7, label_seed=seed, **options)] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert all(pair.drawn and label_margin(pair, 2.0, noise) == math.inf for pair in first)
    assert {pair[:3] for pair in first} == {(0, 1, 0.75), (1, 0, -0.75)}
    share = sum(pair.chosen == 0 for pair in first) / 4000
    assert share == pytest.approx((1 - 2 * noise) / (1 + math.exp(-1.5)) + noise, abs=0.025)


def test_a_tie_is_a_fair_coin_where_labels_are_drawn():
    rows = [instance([1.0, 1.0])] * 1000
    drawn = [pair for _, pair in choose_all(rows, "f", "max_min", 0, label_seed=0)]
    assert len(drawn) == 1000 and 420 < sum(pair.chosen == 0 for pair in drawn) < 580
    assert not list(choose_all(rows, "f", "max_min", 0))


def test_margins_of_the_reward():
    assert label_margin(PreferencePair(0, 1, 0.5), 4.0, 0.0) == 2.0
