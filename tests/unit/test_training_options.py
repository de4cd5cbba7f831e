"""The command line of `run_dpo.py`: every inherited argument acts and is compared, or is refused."""

import dataclasses

import pytest
from transformers import TrainingArguments

from common.cli import UserError
from dpo_iteration.losses import LOSSES, looks_at_margin, takes_hard_labels
from dpo_iteration.options import REFUSED, RUNNING, SHAPING, DPOOptions, parse, settings_of

INHERITED = [field.name for field in dataclasses.fields(TrainingArguments)]
# Values that are not the default, for the arguments where adding 1 or turning a switch makes none.
OTHER = {
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": '{"num_cycles": 0.25}',
    "optim": "sgd",
    "optim_args": "a=1",
    "optim_target_modules": "all-linear",
    "train_sampling_strategy": "sequential",
    "data_seed": 5,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "neftune_noise_alpha": 5.0,
    "eval_accumulation_steps": 2,
    "include_for_metrics": "loss",
    "hub_token": "x",
    "hub_model_id": "x/y",
    "hub_strategy": "end",
    "hub_revision": "x",
    "trackio_space_id": "x",
    "trackio_bucket_id": "x",
    "trackio_static_space_id": "x",
    "metric_for_best_model": "loss",
    "accelerator_config": '{"split_batches": true}',
    "label_names": "x",
    "length_column_name": "x",
    "resume_from_checkpoint": "x",
}


def line(**more) -> list[str]:
    words = {
        "model_name_or_path": "p",
        "ref_model": "r",
        "train_file": "d.json",
        "output_dir": "out",
        "use_cpu": True,
    }
    return [word for name, value in {**words, **more}.items() for word in (f"--{name}", str(value))]


def other_value(name: str):
    """A value of an inherited argument that is not its default."""
    if name in OTHER:
        return OTHER[name]
    default = getattr(parse(line())[1], name)
    return not default if default is None or isinstance(default, bool) else type(default)(default + 1)


def test_every_inherited_argument_is_in_one_table():
    """A new version of transformers that brings one more fails here."""
    tables = [SHAPING, RUNNING, frozenset(REFUSED)]
    assert sorted(INHERITED) == sorted(name for table in tables for name in table)


# Two have no form as text: only a program can set them.
@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"parallelism_config", "liger_kernel_config"}))
def test_refused_arguments_name_themselves(name):
    with pytest.raises(UserError, match=f"--{name}"):
        parse(line(**{name: other_value(name)}))


# tf32 is refused by transformers where there is no GPU.
@pytest.mark.parametrize("name", sorted(SHAPING - {"tf32"}))
def test_shaping_arguments_are_compared(name):
    here, there = (settings_of(*parse(line(**more)), "hash") for more in ({}, {name: other_value(name)}))
    assert here[name] != there[name]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(DPOOptions)])
def test_own_options_are_compared_but_those_of_speed(name):
    stored = settings_of(*parse(line()), "hash")
    assert (name in stored) is (name not in ("save_minutes", "share_prefixes"))


def test_the_name_of_the_data_file_has_an_alias():
    words = [word.replace("--train_file", "--train_dir") for word in line()]
    assert "--train_dir" in words and parse(words)[0].train_file == "d.json"


@pytest.mark.parametrize("name", LOSSES)
def test_labels_and_losses_that_do_not_fit_are_refused(name):
    cases = [
        ({"labels": "sampled"}, takes_hard_labels(name)),
        ({"labels": "sampled", "label_noise": 0.1}, takes_hard_labels(name)),
        ({"label_noise": 0.1}, looks_at_margin(name)),
        ({}, True),
    ]
    for more, fits in cases:
        if fits:
            parse(line(loss_type=name, **more))
        else:
            with pytest.raises(UserError, match=name):
                parse(line(loss_type=name, **more))


@pytest.mark.parametrize(
    "more",
    [
        {"eval_strategy": "steps"},
        {"eval_strategy": "epoch"},
        {"eval_on_start": True},
        {"save_strategy": "best"},
        {"label_noise": 0.6},
        {"label_noise": -0.1},
        {"save_minutes": -1},
        {"load_in_4bit": True},
        {"train_sampling_strategy": "batch_rebalance"},
        {"warmup_steps": -5},
        {"report_to": "trackio"},
    ],
)
def test_values_that_cannot_be_meant(more):
    (name,) = more
    with pytest.raises((UserError, SystemExit)) as raised:
        parse(line(**more))
    assert not isinstance(raised.value, UserError) or name in str(raised.value)
