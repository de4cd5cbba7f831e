"""The lab against enumeration and other libraries: tree, transformer, draws, labels, values, intervals."""

import dataclasses
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from commands import PROJECT
from lab import curvature, design, intervals, noise, sampling, train
from lab.environment import Environment, Setting, exact_values, make_environment
from lab.learners import Scores, Transformer, structure
from lab.tree import mixed, next_token_logps, response_logps, responses
from lab_checkpoint import load_checkpoint, save_checkpoint
from scipy import special, stats
from transformers import GPT2LMHeadModel

from bandit.mixtures import MIXTURES

SMALL = Setting(prompts=2, vocabulary=3, length=3, width=8, depth=2, heads=2, updates=20, pairs=8)
TWO_MODELS = [name for name, row in MIXTURES.items() if not row.third_model]
CANDIDATES_2 = [name for name in [*TWO_MODELS, *sampling.LAB_ONLY] if sampling.lab_sampler(name).row.candidates == 2]


@pytest.fixture(scope="module")
def env() -> Environment:
    return make_environment(SMALL, [0, 1], fit_steps=20)


def random_nodes(seed: int, runs: int = 1, setting: Setting = SMALL, sharpness: float = 1.0) -> torch.Tensor:
    inner = sum(setting.vocabulary**d for d in range(setting.length))
    generator = torch.Generator().manual_seed(seed)
    shape = (runs, setting.prompts, inner, setting.vocabulary)
    return (sharpness * torch.randn(shape, generator=generator)).log_softmax(-1)


def prefix_number(tokens: tuple[int, ...], vocabulary: int) -> int:
    """Position of a prefix among all inner nodes, by counting."""
    everything = [p for d in range(10) for p in itertools.product(range(vocabulary), repeat=d) if d <= len(tokens)]
    return everything.index(tokens)


# --- Tree and learners ------------------------------------------------------------------------------------------


def test_paths_of_the_tree_are_sums_over_tokens():
    nodes = random_nodes(0)
    logps = response_logps(nodes, SMALL.length)
    for number, tokens in enumerate(itertools.product(range(3), repeat=3)):
        path = [nodes[0, 1, prefix_number(tokens[:t], 3), tokens[t]].item() for t in range(3)]
        assert logps[0, 1, number].item() == pytest.approx(sum(path), abs=1e-5)
        assert responses(3, 3)[number].tolist() == list(tokens)
    torch.testing.assert_close(next_token_logps(logps, 3, 3), nodes)


def test_the_transformer_is_gpt2(tmp_path):
    transformer = Transformer(SMALL)
    parameters = transformer.initial(2, torch.Generator().manual_seed(3))
    parameters += 0.05 * torch.randn(parameters.shape, generator=torch.Generator().manual_seed(4))
    logps, _ = transformer(parameters)
    save_checkpoint(SMALL, parameters[1], tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    for prompt in range(SMALL.prompts):
        for number, tokens in enumerate(itertools.product(range(3), repeat=3)):
            with torch.no_grad():
                table = model(torch.tensor([[prompt, *tokens]])).logits[0].log_softmax(-1)
            expected = sum(table[t, token].item() for t, token in enumerate(tokens))
            assert logps[1, prompt, number].item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(load_checkpoint(SMALL, tmp_path), parameters[1])


def test_rewards_are_in_the_span_of_the_linear_learners_features(env):
    features = structure(SMALL.vocabulary, SMALL.length).double()
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1).numpy()
    for rewards in env.rewards.flatten(0, 1).numpy():
        residual = rewards - features @ np.linalg.lstsq(features, rewards)[0]
        assert np.abs(residual).max() < 1e-8


def test_rewards_have_mean_0_and_standard_deviation_1_under_the_reference(env):
    for rewards, logps in zip(env.rewards.flatten(0, 1).numpy(), env.ref_logps.flatten(0, 1).numpy(), strict=True):
        assert np.exp(logps) @ rewards == pytest.approx(0, abs=1e-6)
        assert np.exp(logps) @ rewards**2 == pytest.approx(1, abs=1e-6)


def test_an_environment_does_not_depend_on_the_others(env):
    alone = make_environment(SMALL, [1], fit_steps=20)
    torch.testing.assert_close(alone.rewards[0], env.rewards[1], atol=1e-5, rtol=1e-5)


def test_values_by_plain_sums(env):
    rng, beta = np.random.default_rng(0), 0.3
    logps = np.log(rng.dirichlet(np.ones(27), size=(1, 2)))
    gap, reward, kl = exact_values(torch.tensor(logps), env.ref_logps[:1], env.rewards[:1], beta)[:, 0].tolist()
    expected = np.zeros(3)
    for prompt in range(2):
        ref, r = env.ref_logps[0, prompt].numpy(), env.rewards[0, prompt].numpy()
        best = beta * np.log(np.sum(np.exp(ref + r / beta)))  # the optimum's value
        pi = np.exp(logps[0, prompt])
        value = sum(pi * r) - beta * sum(pi * (logps[0, prompt] - ref))
        expected += np.array([best - value, sum(pi * r), sum(pi * (logps[0, prompt] - ref))]) / 2
    np.testing.assert_allclose([gap, reward, kl], expected, rtol=1e-6)


# --- Draws and labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANDIDATES_2)
def test_pairs_are_drawn_from_the_exact_law(name):
    """Chi-square of 40,000 pairs against the law by enumeration, which is built prefix by prefix here."""
    setting, beta, count, temperature = Setting(prompts=2, vocabulary=2, length=2), 0.25, 40_000, 0.8
    sampler = sampling.lab_sampler(name)
    policy, second = random_nodes(1, setting=setting), random_nodes(2, setting=setting)
    uniforms = torch.rand(1, count, 5, generator=torch.Generator().manual_seed(5))
    weights = sampling.Weights([sampler], beta).draw(uniforms[..., 0])
    prompts = torch.ones(count, dtype=torch.long)
    drawn = sampling.draw_responses(
        policy, second, prompts, weights, uniforms[..., 1:].view(1, count, 2, 2), temperature
    )[0]
    expected = np.zeros((4, 4))
    for probability, *sides in sampler.row.pairs(beta):
        first, other = (side_law(policy[0, 1], second[0, 1], side, temperature) for side in sides)
        expected += probability * np.outer(first, other)
    law = sampling.pair_law(sampler.row, beta, policy, second, 2, temperature)[0, 1]
    np.testing.assert_allclose(law.numpy(), expected, atol=1e-6)
    counts = np.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16)
    assert stats.chisquare(counts, expected.flatten() * count).pvalue > 1e-4


def side_law(policy, second, weights, temperature):
    """Response probabilities of one side, token by token from mixed logits."""
    law = []
    for tokens in itertools.product(range(2), repeat=2):
        probability = 1.0
        for t in range(2):
            node = prefix_number(tokens[:t], 2)
            logits = (weights[0] * policy[node] + weights[1] * second[node]).numpy() / temperature
            probability *= math.exp(logits[tokens[t]]) / sum(math.exp(x) for x in logits)
        law.append(probability)
    return np.array(law)


def test_mixing_tokens_with_weights_of_one_model_gives_that_model():
    policy, second = random_nodes(1), random_nodes(2)
    torch.testing.assert_close(mixed(policy, second, (1.0, 0.0)), policy)
    torch.testing.assert_close(mixed(policy, second, (0.0, 1.0)), second)


def test_labels_are_bradley_terrys_with_flips():
    uniforms = (torch.arange(10_000) + 0.5) / 10_000
    for margin, flips in itertools.product((-3.0, 0.0, 0.7), (0.0, 0.2, 0.5)):
        share = sampling.first_wins(torch.full((10_000,), margin), flips, uniforms).double().mean().item()
        wins = 1 / (1 + math.exp(-margin))
        assert share == pytest.approx((1 - flips) * wins + flips * (1 - wins), abs=2e-4)


@pytest.mark.parametrize("name", [n for n in TWO_MODELS if MIXTURES[n].candidates > 2])
def test_choices_among_candidates_are_the_rows_rule(env, name):
    """Best and worst by the row's scores, found here by sorting."""
    sampler = sampling.lab_sampler(name)
    runs = train.Runs([sampler] * 2, torch.ones(2), torch.tensor([0, 1]))
    prompts = torch.arange(8) % SMALL.prompts
    drawn = torch.randint(0, 27, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    logps = response_logps(random_nodes(7, 2), SMALL.length)
    chosen = train.chosen_two(env, runs, logps, prompts, drawn, 0)
    for run, pair in itertools.product(range(2), range(8)):
        candidates = drawn[run, pair].tolist()
        found = chosen[run, pair].tolist()
        assert all(found.count(y) <= candidates.count(y) for y in found)
        scores = env.rewards[run, prompts[pair]]
        if sampler.row.choose.startswith("implicit"):
            scores = (logps - env.ref_logps)[run, prompts[pair]]
        values = sorted(scores[y].item() for y in candidates)
        if "max_min" in sampler.row.choose:
            assert [scores[y].item() for y in found] == pytest.approx([values[-1], values[0]])
        elif sampler.row.choose == "max_sweet":
            target = np.mean(values) - 2 * np.std(values)
            rest = values[:-1]
            assert scores[found[0]].item() == pytest.approx(values[-1])
            assert scores[found[1]].item() == pytest.approx(min(rest, key=lambda x: abs(x - target)))


@pytest.mark.parametrize("learner", ["table", "linear", "transformer"])
def test_features_are_gradients_of_log_probabilities(env, learner):
    """Differences of two responses to one prompt, by autograd; the transformer's in its head, at the end."""
    model, start = train.make_learner(dataclasses.replace(SMALL, learner=learner), env.reference, env.ref_logps)
    parameters, rows = start[:1].clone().requires_grad_(), torch.tensor([0])
    features = model.features(parameters, rows).detach()[0]
    logps, _ = model(parameters, rows)
    for prompt, first, second in ((0, 0, 26), (1, 5, 11)):
        (gradient,) = torch.autograd.grad(
            logps[0, prompt, first] - logps[0, prompt, second], parameters, retain_graph=True
        )
        found = features[prompt, first] - features[prompt, second]
        torch.testing.assert_close(found, gradient[0, -len(found) :], atol=1e-4, rtol=1e-4)


def test_designs_take_the_pair_of_the_largest_gain():
    """Log det of the information, trace with the Fisher matrix, variance: all pairs tried with numpy."""
    generator = torch.Generator().manual_seed(0)
    features, logps = torch.randn(3, 2, 9, 5, generator=generator), random_logps(generator, 3, 2, 9)
    drawn = torch.randint(0, 9, (3, 6, 4), generator=generator)
    scores, prompts = torch.randn(3, 6, 4, generator=generator), torch.arange(6) % 2
    fixed = torch.zeros(3, 6, dtype=torch.bool)
    fixed[:, 2] = True
    plan = design.Design(["d", "g", "v"])
    plan.see(features, logps)
    chosen = plan.choose(prompts, drawn, scores, fixed)
    for run, kind in enumerate("dgv"):
        information, pi = np.eye(5), logps[run].exp().numpy()
        centred = features[run].numpy() - np.einsum("pn,pnf->pf", pi, features[run].numpy())[:, None]
        fisher = np.einsum("pn,pnf,png->fg", pi, centred, centred) / 2
        for m in range(6):
            tried = []
            for i, j in itertools.combinations(range(4), 2):
                d = (features[run, m % 2, drawn[run, m, i]] - features[run, m % 2, drawn[run, m, j]]).numpy()
                p = special.expit((scores[run, m, i] - scores[run, m, j]).item())
                new = information + (1 if kind == "g" else p * (1 - p)) * np.outer(d, d)
                gain = {
                    "d": np.linalg.slogdet(new)[1],
                    "g": d @ np.linalg.solve(information, d),
                    "v": -np.trace(fisher @ np.linalg.inv(new)),
                }[kind]
                tried.append((gain, [drawn[run, m, i].item(), drawn[run, m, j].item()], new))
            best = tried[0] if m == 2 else max(tried, key=lambda t: t[0])
            assert chosen[run, m].tolist() == best[1]
            information = best[2]


def random_logps(generator, *shape):
    return torch.randn(*shape, generator=generator).log_softmax(-1)


# --- Training ---------------------------------------------------------------------------------------------------


def test_adam_is_torchs():
    ours = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    theirs = ours.clone().requires_grad_()
    adam, reference = train.Adam(ours), torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99))
    for step in range(5):
        gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(step + 1))
        adam(torch.full((3, 1), 0.01), gradient)
        theirs.grad = gradient.clone()
        reference.step()
    torch.testing.assert_close(ours, theirs.detach())


@pytest.mark.parametrize("learner", ["table", "linear", "transformer"])
def test_a_run_does_not_depend_on_the_others_of_its_chunk(env, learner):
    # SGD: Adam's first steps turn rounding of gradients that are 0 into steps of full size.
    setting = dataclasses.replace(SMALL, learner=learner, optimizer="sgd")
    model, _ = train.make_learner(setting, env.reference, env.ref_logps)
    names = ["gshf", "mixp-iterative", "history", "selm", "xpo-bonus"]
    samplers = [sampling.lab_sampler(name) for name in names]
    lrs, seeds = torch.tensor([0.3, 0.6, 0.3, 0.6, 0.3]), torch.tensor([0, 1, 0, 1, 1])
    together, _ = train.train(setting, env, model, train.Runs(samplers, lrs, seeds))
    for run in range(5):
        part = slice(run, run + 1)
        alone, _ = train.train(setting, env, model, train.Runs(samplers[part], lrs[part], seeds[part]))
        np.testing.assert_allclose(together[:, run], alone[:, 0], rtol=1e-3, atol=1e-4)


def test_the_expected_update_of_the_table_is_the_theorys(env):
    """Table with SGD, averaged over the exact law: lr beta sum_y' (w + w^T)(y, y') (P*(y > y') - sigma(beta h))."""
    setting, beta = dataclasses.replace(SMALL, learner="table", prompts=1), SMALL.beta
    one = Environment(env.rewards[:1, :1], env.reference[:1], env.ref_nodes[:1, :1], env.ref_logps[:1, :1])
    theta = torch.randn(1, 27, generator=torch.Generator().manual_seed(2)).requires_grad_()
    logps, nodes = Scores(setting, one.ref_logps)(theta, torch.tensor([0]))
    law = sampling.pair_law(MIXTURES["gshf"], beta, nodes, one.ref_nodes, 3)[0, 0]
    runs = train.Runs([sampling.lab_sampler("gshf")], torch.ones(1), torch.tensor([0]))
    r, total = one.rewards[0, 0].float(), 0
    for first, second in itertools.product(range(27), repeat=2):
        for chosen, rejected in ((first, second), (second, first)):
            share = law[first, second] * (r[chosen] - r[rejected]).sigmoid()
            pair = (torch.tensor([[y]]) for y in (chosen, rejected, second))
            total = total + share * train.loss_of(setting, one, runs, logps, train.Pairs(torch.tensor([0]), *pair))
    (gradient,) = torch.autograd.grad(total, theta)
    u = beta * (logps.detach().double() - one.ref_logps)[0, 0].numpy()
    gaps, margins, w = u[:, None] - u, (r[:, None] - r).numpy(), law.double().numpy()
    expected = beta * ((w + w.T) * (special.expit(margins) - special.expit(gaps))).sum(axis=1)
    np.testing.assert_allclose(-gradient[0].numpy(), expected, atol=1e-6)
    in_one = train.expected_gradient(setting, one, runs, logps.detach(), nodes, one.ref_nodes)
    np.testing.assert_allclose(-in_one[0, 0].numpy(), expected, atol=1e-6)


def test_each_epoch_passes_over_every_pair_once():
    setting = Setting(updates=24, pairs=4, iterations=2, epochs=3)
    numbers = torch.arange(16)
    data = train.Pairs(numbers, *(numbers.unsqueeze(0) for _ in range(3)))
    seen = [data.batch(setting, 0, step).chosen[0].tolist() for step in range(12)]
    for epoch in range(3):
        assert sorted(sum(seen[4 * epoch : 4 * epoch + 4], [])) == list(range(16))


@pytest.mark.parametrize("name", ["online", "gshf", "theory"])
def test_the_curvature_is_autograds_hessian_of_the_expected_loss(env, name):
    """Table and linear at the optimum: the whole Hessian of the loss, summed over pairs and labels."""
    optimum = (env.ref_logps + env.rewards / SMALL.beta).log_softmax(-1)
    hessian = curvature.loss_hessian(SMALL, env, optimum, MIXTURES[name], 1)
    nodes = [next_token_logps(logps[1:2], 3, 3) for logps in (optimum, env.ref_logps)]
    law = sampling.pair_law(MIXTURES[name], SMALL.beta, *nodes, 3)[0]
    wins = (env.rewards[1].unsqueeze(-1) - env.rewards[1].unsqueeze(-2)).sigmoid()
    features = structure(3, 3).double()
    for learner, matrix in (("table", torch.eye(27).double()), ("linear", features)):

        def loss(theta, matrix=matrix):
            u = SMALL.beta * (optimum - env.ref_logps)[1] + SMALL.beta * theta.view(2, -1) @ matrix.T
            h = u.unsqueeze(-1) - u.unsqueeze(-2)
            log_loss = -wins * torch.nn.functional.logsigmoid(h) - (1 - wins) * torch.nn.functional.logsigmoid(-h)
            return (law * log_loss).sum() / 2

        whole = torch.autograd.functional.hessian(loss, torch.zeros(2 * matrix.shape[1]).double())
        expected = torch.linalg.eigvalsh(whole).flip(0).numpy()
        kernel = curvature.tangent_kernel(SMALL, env, None, learner, 1)
        found = curvature.eigenvalues(kernel, curvature.root_of(hessian))
        size = min(len(found), len(expected))
        np.testing.assert_allclose(found[:size], expected[:size], atol=1e-6 * expected[0])


@pytest.mark.parametrize("name", ["online", "gshf", "theory"])
def test_at_the_optimum_a_pairs_gradient_has_the_hessian_as_its_covariance(name):
    """Every pair with both labels, through the training's own loss and autograd."""
    setting = dataclasses.replace(SMALL, length=2)
    env, rows, row = make_environment(setting, [0, 1], fit_steps=20), torch.tensor([1]), sampling.lab_sampler(name)
    optimum = (env.ref_logps + env.rewards / setting.beta).log_softmax(-1)
    logps = optimum[1:2].clone().requires_grad_()
    nodes = next_token_logps(optimum[1:2], 3, 2)
    law = sampling.pair_law(row.row, setting.beta, nodes, env.ref_nodes[rows], 2)[0]
    runs, covariance = train.Runs([row], torch.ones(1), rows), 0
    for prompt, chosen, rejected in itertools.product(range(2), range(9), range(9)):
        both = law[prompt, chosen, rejected] + law[prompt, rejected, chosen]
        wins = (env.rewards[1, prompt, chosen] - env.rewards[1, prompt, rejected]).sigmoid()
        pair = (torch.tensor([[y]]) for y in (chosen, rejected, rejected))
        loss = train.loss_of(setting, env, runs, logps, train.Pairs(torch.tensor([prompt]), *pair))
        gradient = torch.autograd.grad(loss, logps)[0].flatten()
        covariance = covariance + both * wins * torch.outer(gradient, gradient) / 2
    hessian = curvature.loss_hessian(setting, env, optimum, row.row, 1)
    np.testing.assert_allclose(covariance.detach().numpy(), hessian.numpy(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("labels", [8, math.inf])
def test_a_linearised_run_is_the_recursion_of_mean_and_covariance(labels):
    """In the parameters, with whole matrices; 5 parameters of 8 log-probabilities."""
    rng = np.random.default_rng(0)
    jacobian, edges, spread = (rng.normal(size=shape) for shape in ((8, 5), (8, 8), (8, 8)))
    edges = np.abs(edges + edges.T)
    hessian, value = np.diag(edges.sum(1)) - edges, spread @ spread.T
    first, curved, worth = rng.normal(size=5), jacobian.T @ hessian @ jacobian, jacobian.T @ value @ jacobian
    tensors = (torch.from_numpy(x) for x in (jacobian @ jacobian.T, hessian, value, jacobian @ first))
    found = noise.run_gaps(*tensors, updates=12, labels=labels)
    for rate, gap in zip(noise.RATES.numpy(), found.numpy(), strict=True):
        mean, covariance = first, np.zeros((5, 5))
        for update in range(12):
            size = rate / np.linalg.eigvalsh(curved)[-1] * (1 - update / 12)
            kept = np.eye(5) - size * curved
            mean, covariance = kept @ mean, kept @ covariance @ kept.T + size**2 / labels * curved
        assert gap == pytest.approx((mean @ worth @ mean + np.trace(worth @ covariance)) / 2, rel=1e-6)


def test_the_value_gaps_hessian_is_autograds(env):
    optimum = (env.ref_logps + env.rewards / SMALL.beta).log_softmax(-1)[1]

    def gap(change: torch.Tensor) -> torch.Tensor:
        moved = (optimum + change.view(2, 27)).log_softmax(-1).unsqueeze(0)
        return exact_values(moved, env.ref_logps[1:], env.rewards[1:], SMALL.beta)[0, 0]

    whole = torch.autograd.functional.hessian(gap, torch.zeros(54).double())
    torch.testing.assert_close(noise.value_hessian(SMALL, optimum), whole, rtol=1e-6, atol=1e-10)


# --- Intervals --------------------------------------------------------------------------------------------------


def test_a_seeds_learning_rate_is_chosen_without_it():
    rng = np.random.default_rng(0)
    gaps = rng.random((4, 23))
    values, used = intervals.cross_fitted(gaps)
    for seed in range(23):
        changed = gaps.copy()
        changed[:, seed] = rng.random(4) * 1e6
        assert intervals.cross_fitted(changed)[1][seed] == used[seed]
        assert values[seed] == gaps[used[seed], seed]


def test_a_diverged_learning_rate_is_not_chosen():
    gaps = np.array([[0.5] * 10, [0.1] * 9 + [np.inf]])
    assert intervals.cross_fitted(gaps)[1].tolist().count(0) >= 8


def test_paired_intervals_are_scipys():
    differences = np.random.default_rng(1).normal(0.2, 1, 17)
    mean, low, high, p = intervals.paired(differences)
    expected = stats.ttest_1samp(differences, 0)
    interval = expected.confidence_interval()
    np.testing.assert_allclose([mean, low, high, p], [differences.mean(), *interval, expected.pvalue])


def test_holm_keeps_the_family_wise_error():
    """Under the null about 5% of 2,000 families reject anything; never more than Bonferroni demands."""
    rng = np.random.default_rng(2)
    p = rng.random((2000, 6))
    adjusted = np.array([intervals.holm(row) for row in p])
    assert (adjusted.min(axis=1) < 0.05).mean() < 0.07
    assert (adjusted >= p).all() and (adjusted <= np.minimum(6 * p, 1) + 1e-12).all()
    assert intervals.holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])


def test_nothing_imports_the_lab():
    folders = [PROJECT / "bandit", *(f for f in (PROJECT / "alignment").iterdir() if f.is_dir() and f.name != "lab")]
    for path in [p for folder in folders for p in folder.rglob("*.py")]:
        text = path.read_text()
        assert "from lab" not in text and "import lab" not in text, path
    assert "lab.train" in sys.modules
