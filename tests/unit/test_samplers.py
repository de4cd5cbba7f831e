"""The sampler table, its command-line forms, and how responses are assigned to the sides of pairs."""

import json
from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest

from bandit.mixtures import MIXTURES, family
from bandit.problem import make_bandit
from bandit.samplers import SAMPLERS, get_sampler
from common.cli import UserError
from generation.sampling import (
    as_settings,
    assign_rows,
    check_count,
    check_temperature,
    models_needed,
    pairs_from_json,
    sampler_by_name,
    sampler_from_json,
    stream_seed,
)

# Written out from the paper's section 5 and from the sources that the rows name; not from the code.
PUBLISHED = {
    "offline": [[1.0, [0, 1], [0, 1]]],
    "online": [[1.0, [1, 0], [1, 0]]],
    "gshf": [[1.0, [0, 1], [1, 0]]],
    "mixp": [[1.0, [1.5, -0.5], [0.5, 0.5]]],
    "mixp-iterative": [[pytest.approx(0.3), [1, 0], [1, 0]], [0.7, [1.5, -0.5], [0.5, 0.5]]],
    "pilaf": [[0.5, [1, 0], [1, 0]], [0.5, [1.25, -0.25], [0.75, 0.25]]],  # beta = 1/4
    "simplemix": [[0.5, [1, 0], [1, 0]], [0.5, [0, 1], [0, 1]]],
    "xpo": [[1.0, [1, 0], [0, 1]]],
    "history": [[1.0, [1, 0], [0, 1]]],
    "history-mixp": [[1.0, [1.5, -0.25, -0.25], [0.5, 0.25, 0.25]]],
    "best-worst": [[1.0, [1, 0], [1, 0]]],
    "implicit-best-worst": [[1.0, [1, 0], [1, 0]]],
    "random-pairs": [[1.0, [1, 0], [1, 0]]],
    "best-sweet": [[1.0, [1, 0], [1, 0]]],
    "theory": [[1.0, [0.25, 0.75], [-0.25, 1.25]]],
    "theory-mix": [[0.5, [0, 1], [0, 1]], [0.5, [0.25, 0.75], [-0.25, 1.25]]],
    "nash-md": [[1.0, [1, 0], [0.875, 0.125]]],
}


def pairs_of(name: str, beta: float = 0.1):
    return sampler_by_name(name).pairs(beta)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_with_a_source_are_those_of_the_source(name):
    assert as_settings(pairs_of(name, beta=0.25)) == PUBLISHED[name]


def test_the_papers_samplers_draw_two_responses_and_label_the_better_one():
    for name in ("offline", "online", "gshf", "mixp", "mixp-iterative", "pilaf"):
        row = sampler_by_name(name)
        choose = "max_min" if len(row.pairs(0.1)) == 1 else "mixed_max_min"
        assert (row.candidates, row.choose, row.second_model) == (2, choose, "reference")


def test_family_members_have_names():
    assert pairs_of("mix_0.5_0.5_1") == pairs_of("mix:0.5,0.5,1") == pairs_of("mixp")
    assert pairs_of("mix_-0.2_1e-1_0.5") == family(-0.2, 0.1, 0.5)
    assert pairs_of("mix_3_3_0") == pairs_of("online")


@pytest.mark.parametrize("name", ["mix_1", "mix_1_2", "mix_1_2_3", "mix_a_b_c", "mix_nan_0_1", "mix_0_0_0_1"])
def test_wrong_family_names_are_refused(name):
    with pytest.raises(UserError, match=name):
        sampler_by_name(name)


def test_every_side_of_every_pair_is_normalised_like_a_distribution():
    # Weights that sum to 1 keep a logit shift common to both models a shift.
    for name in MIXTURES:
        for row in pairs_of(name):
            assert sum(row.first) == pytest.approx(1) and sum(row.second) == pytest.approx(1)


def test_family_with_probability_is_the_iterative_prompt_setting():
    assert as_settings(family(0.5, 0.5, 0.7)) == [
        [pytest.approx(0.3), [1, 0], [1, 0]],
        [0.7, [1.5, -0.5], [0.5, 0.5]],
    ]


def test_json_round_trip():
    for name in MIXTURES:
        pairs = pairs_of(name, 0.3)
        assert pairs_from_json(json.dumps(as_settings(pairs))) == pairs


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "1",
        "[[1,[1,0]]]",
        "[[1,[1,0],[1]]]",
        "[[1,[1,0],[1,0,0]]]",
        "[[1,[1],[1]]]",
        "[[1,[1,0,0,0],[1,0,0,0]]]",
        "[[1,1,[1,0]]]",
        "[[0.5,[1,0],[1,0]]]",
        "[[-1,[1,0],[1,0]],[2,[1,0],[1,0]]]",
        "[[1,[NaN,0],[1,0]]]",
        "[[1,['a',0],[1,0]]]",
    ],
)
def test_wrong_json_is_refused(text):
    with pytest.raises(UserError, match="--pairs"):
        pairs_from_json(text)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="offline, online, gshf, mixp, mixp-iterative, pilaf"):
        sampler_by_name("best")


def test_models_needed():
    assert models_needed(pairs_of("online")) == (True, False)
    assert models_needed(pairs_of("offline")) == (False, True)
    assert models_needed(pairs_of("gshf")) == (True, True)
    assert models_needed(pairs_from_json("[[1,[2,0],[1,0]]]")) == (True, True)
    assert models_needed(pairs_from_json("[[1,[2,0],[2,0]]]")) == (True, True)
    assert models_needed(pairs_of("history-mixp")) == (True, True, True)
    assert models_needed(pairs_from_json("[[1,[0,0,1],[0,0,1]]]")) == (False, False, True)


def test_a_third_weight_is_that_of_the_policy_of_the_iteration_before():
    row = sampler_from_json("[[1,[1,-1,1],[0.5,0.25,0.25]]]")
    assert row.models == sampler_by_name("history-mixp").models == ("policy", "reference", "previous")
    assert sampler_from_json("[[1,[1,0],[0.5,0.5]]]").models == ("policy", "reference")


@pytest.mark.parametrize("count", [2, 4, 8])
def test_half_of_the_responses_come_from_each_side(count):
    assignments = assign_rows(pairs_of("mixp"), count, seed=1)
    assert [a.weights for a in assignments] == [(1.5, -0.5)] * (count // 2) + [(0.5, 0.5)] * (count // 2)


def test_response_j_and_its_partner_share_a_row():
    sampler = family(0.5, 0.5, 0.7)
    for seed in range(50):
        rows = [a.row for a in assign_rows(sampler, 8, seed)]
        assert rows[:4] == rows[4:]


def test_rows_are_drawn_with_their_probabilities():
    sampler = family(0.5, 0.5, 0.7)
    n = 20_000
    counts = Counter(assign_rows(sampler, 2, stream_seed(0, i))[0].row for i in range(n))
    # Five standard errors of a binomial proportion.
    assert abs(counts[1] / n - 0.7) < 5 * (0.7 * 0.3 / n) ** 0.5


def test_odd_count_needs_a_one_sided_sampler():
    check_count(pairs_of("online"), 1)
    assert len(assign_rows(pairs_of("online"), 3, 0)) == 3
    with pytest.raises(UserError, match="must be even"):
        check_count(pairs_of("gshf"), 3)


def chosen_pairs(row, sides, scores):
    """P(y, y') of a pair whose arms are chosen from the row's candidates, half of them from each side."""
    joint, half = np.zeros((len(scores), len(scores))), row.candidates // 2
    for arms in product(range(len(scores)), repeat=row.candidates):
        probability = np.prod([sides[0][y] for y in arms[:half]] + [sides[1][y] for y in arms[half:]])
        if row.choose == "random":
            pairs = list(permutations(arms, 2))
        else:
            pairs = [(max(arms, key=lambda y: scores[y]), min(arms, key=lambda y: scores[y]))]
        for first, second in pairs:
            joint[first, second] += probability / len(pairs)
    return joint


@pytest.mark.parametrize("name", [name for name in MIXTURES if name in SAMPLERS])
def test_the_bandit_has_the_same_sampler(name):
    """Pair probabilities in the bandit's table, against those that this table's rows give by enumeration."""
    rng, beta, row = np.random.default_rng(0), 0.25, sampler_by_name(name)
    bandit = make_bandit(rng.standard_normal(3), beta, np.log(rng.dirichlet(np.ones(3))))
    u, before = rng.standard_normal((2, 1, 3))
    weights, _ = get_sampler(name).weights(u, bandit, before)
    logs = {"policy": bandit.log_policy(u), "reference": bandit.log_ref, "previous": bandit.log_policy(before)}
    scores = u[0] if row.choose == "implicit_max_min" else bandit.rewards[0]
    expected = np.zeros((3, 3))
    for probability, *arms in row.pairs(beta):
        sides = [np.exp(sum(w * logs[model][0] for model, w in zip(row.models, arm, strict=True))) for arm in arms]
        expected += probability * chosen_pairs(row, [side / side.sum() for side in sides], scores)
    np.testing.assert_allclose(weights[0] / weights[0].sum(), (expected + expected.T) / 2, atol=1e-12)


def test_stream_seeds_are_distinct_and_stable():
    seeds = {stream_seed(s, i, j) for s in range(3) for i in range(100) for j in range(4)}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Fixed for good: data files of earlier versions must stay reproducible.
    assert stream_seed(42, 7, 1) == 8426691904267727719


def test_vllm_samples_at_the_temperatures_that_are_let_through():
    """vLLM raises what is too low by itself, and refuses what is too high."""
    from vllm import SamplingParams

    for temperature in (0.0, 0.01, 0.7, 2.0):
        check_temperature("vllm", temperature)
        assert SamplingParams(temperature=temperature).temperature == temperature
    assert SamplingParams(temperature=0.005).temperature != 0.005
    for temperature in (0.005, 2.1):
        check_temperature("hf", temperature)
        with pytest.raises(UserError, match=f"--temperature {temperature}"):
            check_temperature("vllm", temperature)
