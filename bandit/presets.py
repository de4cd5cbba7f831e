"""The settings of every preset, as data. A command-line flag of the same name overrides one entry."""

_COMMON = {
    "mode": "exact",
    "samplers": ["DPO-Unif", "DPO-Mix-R", "DPO-Mix-P"],
    "rewards": None,
    "reward_dist": "normal",
    "ref_logprobs": None,
    "num_actions": 20,
    "num_envs": 1,
    "beta": 3.0,
    "lr": 10.0,
    "num_iter": 100,
    "num_samples": 8192,
    # The first seed whose rewards leave DPO-Unif stable at the paper's lr 10: about 7% of draws do not, 0 among them.
    "seed": 1,
    "dtype": "float64",
}

PRESETS = {
    # The paper's figure with exact gradients.
    "paper-exact": _COMMON,
    # The paper's figure with sampled gradients: Mix-P's weights are clipped there.
    "paper-empirical": {
        **_COMMON,
        "mode": "empirical",
        "samplers": ["DPO-Unif", "DPO-Mix-R", "DPO-Mix-P*"],
        "lr": 0.05,
        "num_iter": 3000,
    },
    # The theorems' setting: num_envs instances for each size, see theory.instances.
    "theory": {
        **_COMMON,
        "samplers": ["DPO-Unif", "DPO-Mix-R", "DPO-Mix-P", "DPO-Mix-P*"],
        "reward_dist": "uniform",
        "lr": "theory",
        "num_actions": [2, 3, 5, 10, 20, 50, 100],
        "num_envs": 300,
        "num_iter": 40,
    },
}

# Presets that are several runs, each in a folder of its own.
GROUPS = {"paper": ["paper-exact", "paper-empirical"]}

NAMES = [*PRESETS, *GROUPS]

# Values of --mode, and the modes of simulate.simulate that each stands for.
MODES = {"exact": ["exact"], "empirical": ["sampled"], "both": ["exact", "sampled"]}
# Their names in file keys: trajectories.npz and summary.csv call sampled gradients what the flag calls them.
MODE_KEYS = {"exact": "exact", "sampled": "empirical"}
