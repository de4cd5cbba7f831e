"""The sampler table, its command-line forms, and how responses are assigned to the sides of pairs."""

import json
from collections import Counter

import numpy as np
import pytest

from bandit.problem import make_bandit
from bandit.samplers import get_sampler
from common.cli import UserError
from generation.interface import stream_seed
from generation.samplers import (
    SAMPLERS,
    as_settings,
    assign_rows,
    check_count,
    family,
    models_needed,
    sampler_by_name,
    sampler_from_json,
)

# Written out from the paper, section 5, and arXiv 2502.04270; not from the code.
PUBLISHED = {
    "offline": [[1.0, [0, 1], [0, 1]]],
    "online": [[1.0, [1, 0], [1, 0]]],
    "gshf": [[1.0, [0, 1], [1, 0]]],
    "mixp": [[1.0, [1.5, -0.5], [0.5, 0.5]]],
    "pilaf": [[0.5, [1, 0], [1, 0]], [0.5, [1.25, -0.25], [0.75, 0.25]]],  # beta = 1/4
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_table_is_the_published_one(name):
    assert as_settings(sampler_by_name(name, beta=0.25)) == PUBLISHED[name]


def test_every_side_of_every_pair_is_normalised_like_a_distribution():
    # Weights that sum to 1 keep a logit shift common to both models a shift.
    for name in SAMPLERS:
        for row in sampler_by_name(name, 0.1):
            assert sum(row.first) == pytest.approx(1) and sum(row.second) == pytest.approx(1)


def test_family_with_probability_is_the_iterative_prompt_setting():
    assert as_settings(family(0.5, 0.5, 0.7)) == [
        [pytest.approx(0.3), [1, 0], [1, 0]],
        [0.7, [1.5, -0.5], [0.5, 0.5]],
    ]


def test_json_round_trip():
    for name in SAMPLERS:
        sampler = sampler_by_name(name, 0.3)
        assert sampler_from_json(json.dumps(as_settings(sampler))) == sampler


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "1",
        "[[1,[1,0]]]",
        "[[1,[1,0],[1]]]",
        "[[0.5,[1,0],[1,0]]]",
        "[[-1,[1,0],[1,0]],[2,[1,0],[1,0]]]",
        "[[1,[NaN,0],[1,0]]]",
        "[[1,['a',0],[1,0]]]",
    ],
)
def test_wrong_json_is_refused(text):
    with pytest.raises(UserError, match="--pairs"):
        sampler_from_json(text)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="offline, online, gshf, mixp, pilaf"):
        sampler_by_name("best", 0.1)


def test_models_needed():
    assert models_needed(sampler_by_name("online", 0.1)) == (True, False)
    assert models_needed(sampler_by_name("offline", 0.1)) == (False, True)
    assert models_needed(sampler_by_name("gshf", 0.1)) == (True, True)
    assert models_needed(sampler_from_json("[[1,[2,0],[1,0]]]")) == (True, True)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_half_of_the_responses_come_from_each_side(count):
    assignments = assign_rows(sampler_by_name("mixp", 0.1), count, seed=1)
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
    check_count(sampler_by_name("online", 0.1), 1)
    assert len(assign_rows(sampler_by_name("online", 0.1), 3, 0)) == 3
    with pytest.raises(UserError, match="must be even"):
        check_count(sampler_by_name("gshf", 0.1), 3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_bandit_has_the_same_sampler(name):
    """Pair probabilities in the bandit's table, against those that this table's rows give by enumeration."""
    rng, beta = np.random.default_rng(0), 0.25
    bandit = make_bandit(rng.standard_normal(5), beta, np.log(rng.dirichlet(np.ones(5))))
    u = rng.standard_normal((1, 5))
    weights, _ = get_sampler(name).weights(u, bandit)
    log_pi, log_ref = bandit.log_policy(u)[0], bandit.log_ref[0]
    expected = np.zeros((5, 5))
    for probability, *sides in sampler_by_name(name, beta):
        first, second = (np.exp(w * log_pi + v * log_ref) for w, v in sides)
        expected += probability * np.outer(first / first.sum(), second / second.sum())
    np.testing.assert_allclose(weights[0] / weights[0].sum(), (expected + expected.T) / 2, atol=1e-12)


def test_stream_seeds_are_distinct_and_stable():
    seeds = {stream_seed(s, i, j) for s in range(3) for i in range(100) for j in range(4)}
    assert len(seeds) == 1200
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Fixed for good: data files of earlier versions must stay reproducible.
    assert stream_seed(42, 7, 1) == 8426691904267727719
