"""Lab and pipeline are one thing: a model of the lab through the real scripts ends where the lab ends.

generate.py draws from it, get_rewards.py scores with the environment's rewards as a Python function, run_dpo.py
trains on all pairs at once. The lab's learner, loss and optimizer on the same pairs give the same losses and weights.
"""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from commands import python
from lab import train
from lab.environment import Setting, make_environment
from lab.learners import Transformer
from lab.sampling import lab_sampler, pair_law
from lab_checkpoint import load_checkpoint, numbers, save_checkpoint, words
from scipy import stats
from transformers import AutoModelForCausalLM

from bandit.mixtures import MIXTURES
from common.record_stream import read_records
from dpo_iteration.pairs import choose_all

SETTING = Setting(prompts=3, vocabulary=3, length=3, width=16, depth=2, heads=2, loss="rev_kl")
UPDATES, LR, SCALE, PROMPTS, TEMPERATURE = 12, 0.01, 1.0, 360, 0.8


@pytest.fixture(scope="module")
def env():
    return make_environment(SETTING, [0], fit_steps=60)


@pytest.fixture(scope="module")
def policy(env):
    """Parameters of a policy that is not the reference."""
    noise = torch.randn(env.reference.shape, generator=torch.Generator().manual_seed(1))
    return (env.reference + 0.1 * noise)[0]


@pytest.fixture(scope="module")
def annotated(env, policy, tmp_path_factory):
    """The folder of both models and what generate.py and get_rewards.py wrote."""
    folder = tmp_path_factory.mktemp("bridge")
    save_checkpoint(SETTING, env.reference[0], folder / "reference")
    save_checkpoint(SETTING, policy, folder / "policy")
    letters = words(SETTING)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": letters[i % SETTING.prompts]}) + "\n" for i in range(PROMPTS))
    )
    rewards = {x: r.tolist() for x, r in zip(letters, env.rewards[0], strict=True)}
    (folder / "rewards.json").write_text(json.dumps(rewards))
    (folder / "environment.py").write_text(
        "import json, pathlib\n"
        "REWARDS = json.loads((pathlib.Path(__file__).parent / 'rewards.json').read_text())\n"
        "def reward(prompt, responses, fields):\n"
        "    digits = [''.join(str('abc'.index(t)) for t in text.split()) for text in responses]\n"
        "    return [REWARDS[prompt.strip()][int(number, 3)] for number in digits]\n"
    )
    run(
        "generation/generate.py",
        *("--model_name_or_path", folder / "policy", "--ref_model_name_or_path", folder / "reference"),
        *("--dataset_name_or_path", folder / "prompts.jsonl", "--sampler", "mixp", "--K", 2, "--backend", "hf"),
        *("--temperature", TEMPERATURE, "--max_new_tokens", SETTING.length, "--max_input_length", 1),
        *("--seed", 3, "--dtype", "float32", "--output_file", folder / "responses.json"),
    )
    run(
        "annotate_data/get_rewards.py",
        *("--dataset_name_or_path", folder / "responses.json", "--output_file", folder / "data.json"),
        *("--reward_function", f"{folder / 'environment.py'}:reward"),
    )
    return folder


def run(script, *arguments):
    result = python(script, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_real_responses_follow_the_labs_law(env, policy, annotated):
    """Chi-square of the first and of the second responses of each prompt against the exact law, in 3 classes."""
    instances, _ = read_records(annotated / "data.json", ("responses", "rewards"))
    _, nodes = Transformer(SETTING)(policy.unsqueeze(0))
    law = (
        pair_law(MIXTURES["mixp"], SETTING.beta, nodes, env.ref_nodes, SETTING.length, TEMPERATURE)[0]
        .double()
        .numpy()
    )
    for prompt, response in np.ndindex(SETTING.prompts, 2):
        ids = [i["response_ids"][response] for i in instances[prompt :: SETTING.prompts]]
        counts = Counter(numbers(SETTING, found) for found in ids)
        expected = law[prompt].sum(axis=1 - response)
        # Classes of about equal probability: the tails of 27 responses are too rare for a chi-square.
        order = np.argsort(-expected)
        classes = np.minimum((np.cumsum(expected[order]) * 3).astype(int), 2)
        observed = [sum(counts[y] for y in order[classes == c]) for c in range(3)]
        shares = [expected[order[classes == c]].sum() for c in range(3)]
        assert stats.chisquare(observed, np.array(shares) / sum(shares) * len(ids)).pvalue > 1e-4


def test_the_real_rewards_are_the_environments(env, annotated):
    instances, _ = read_records(annotated / "data.json", ("responses", "rewards"))
    for row, instance in enumerate(instances):
        for ids, reward in zip(instance["response_ids"], instance["rewards"], strict=True):
            assert reward == pytest.approx(env.rewards[0, row % SETTING.prompts, numbers(SETTING, ids)].item())


def test_training_ends_where_the_lab_ends(env, policy, annotated):
    instances, _ = read_records(annotated / "data.json", ("responses", "rewards"))
    rows = list(choose_all(instances, "data.json", "max_min", seed=42))
    run(
        "dpo_iteration/run_dpo.py",
        *("--model_name_or_path", annotated / "policy", "--ref_model", annotated / "reference"),
        *("--train_dir", annotated / "data.json", "--output_dir", annotated / "trained", "--loss_type", "rev_kl"),
        *("--choose_type", "max_min", "--beta", SETTING.beta, "--margin_scale", SCALE, "--learning_rate", LR),
        *("--max_length", SETTING.length + 1, "--max_prompt_length", 1, "--num_train_epochs", UPDATES),
        *("--per_device_train_batch_size", len(rows), "--gradient_accumulation_steps", 1, "--logging_steps", 1),
        *("--lr_scheduler_type", "linear", "--warmup_steps", 0, "--weight_decay", 0, "--max_grad_norm", 0),
        *("--adam_beta1", 0.9, "--adam_beta2", 0.99, "--adam_epsilon", 1e-8, "--optim", "adamw_torch"),
        *("--bf16", False, "--use_cpu", True),
    )
    parameters, losses = train_in_the_lab(env, policy, instances, rows)
    state = json.loads((annotated / "trained" / "trainer_state.json").read_text())
    logged = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    np.testing.assert_allclose(logged, losses, atol=2e-4)
    assert losses[0] - losses[-1] > 0.05
    trained = load_checkpoint(SETTING, annotated / "trained")
    torch.testing.assert_close(trained, parameters, atol=2e-3, rtol=0)
    assert (parameters - policy).abs().max() > 0.03
    # The row that rules out the stop token is where it was: its probability is 0, and with it its gradient.
    never = AutoModelForCausalLM.from_pretrained(annotated / "trained").lm_head.weight[SETTING.vocabulary]
    torch.testing.assert_close(never, torch.full_like(never, -100.0))


def train_in_the_lab(env, policy, instances, rows):
    """The lab's learner, loss and optimizer on the pairs of the data file: final parameters and losses."""
    prompts, chosen, rejected = [], [], []
    for instance, pair in rows:
        prompts.append(words(SETTING).index(instance["prompt"].strip()))
        chosen.append(numbers(SETTING, instance["response_ids"][pair.chosen]))
        rejected.append(numbers(SETTING, instance["response_ids"][pair.rejected]))
    chosen, rejected = torch.tensor([chosen]), torch.tensor([rejected])
    batch = train.Pairs(torch.tensor(prompts), chosen, rejected, rejected)
    runs = train.Runs([lab_sampler("mixp")], torch.tensor([LR]), torch.tensor([0]))
    parameters = policy.unsqueeze(0).clone().requires_grad_()
    learner, optimizer, losses = Transformer(SETTING), train.Adam(parameters), []
    for update in range(UPDATES):
        loss = train.loss_of(SETTING, env, runs, learner(parameters)[0], batch)
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, parameters)
        optimizer(torch.tensor([[LR * (1 - update / UPDATES)]]), gradient)
    return parameters.detach()[0], losses
