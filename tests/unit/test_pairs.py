"""The choice of pairs, by enumeration of all reward patterns."""

import itertools
import random
from collections import Counter

import pytest

from common.cli import UserError
from dpo_iteration.pairs import CHOOSE_TYPES, choose, choose_all

# Every pattern of ties and orders of four responses occurs among these 256.
PATTERNS = list(itertools.product(range(4), repeat=4))


def instance(rewards, pairs=None, responses=None, **more) -> dict:
    responses = responses or [f"text {i}" for i in range(len(rewards))]
    return {"prompt": "p", "responses": responses, "rewards": list(rewards), "pairs": pairs, **more}


def pick(choose_type, rewards, seed=0, pairs=None, penalty=0.0, **more):
    return choose(instance(rewards, pairs, **more), choose_type, random.Random(seed), penalty)


def test_table():
    wanted = {
        "random",
        "max_random",
        "max_min",
        "max_max",
        "max_sweet",
        "max_min_p",
        "implicit_max_min",
        "mixed_max_min",
    }
    assert set(CHOOSE_TYPES) == wanted


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
    first, again, other = (choose_all(rows, "f", "random", seed)[0] for seed in (1, 1, 2))
    assert [p for _, p in first] == [p for _, p in again] != [p for _, p in other]
    # A row's pair does not depend on how many rows stand before the end of the file.
    assert [p for _, p in choose_all(rows[:7], "f", "random", 1)[0]] == [p for _, p in first[:7]]


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
    kept, dropped = choose_all(rows, "f", "max_min", 0)
    assert [(row is rows[0] or row is rows[2], pair.chosen) for row, pair in kept] == [(True, 1), (True, 0)]
    assert dropped == {"equal rewards": 1, "identical responses": 1}


def test_one_response_is_an_error_that_names_the_row():
    with pytest.raises(UserError, match=r"data\.json: row 1: one response"):
        choose_all([instance([0, 1]), instance([1])], "data.json", "max_min", 0)
