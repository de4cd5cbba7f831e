"""LoRA adapters: what is saved is what was trained, tied or not; adapters are policies like any other."""

import http.server
import json
import shutil
import threading

import pytest
import torch
from commands import python
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import save_tiny_policy
from training_runs import flags, make_instances, train, write_data
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from common import adapters
from common.adapters import whole_model
from common.cli import UserError
from common.models import load_causal_lm, load_config, load_tokenizer

IDS = torch.tensor([[1, 5, 6, 7, 8, 20, 2]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Merged models go into a folder of the test's own."""
    monkeypatch.setattr(adapters, "cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def save_adapter(base, folder, targets=("q_proj", "up_proj"), **options):
    """An adapter with random weights, as peft saves it."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,lm_head", "embed_tokens,q_proj", "embed_tokens,lm_head"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_base_and_adapter(tmp_path, tied, targets):
    """Head and embedding of a tied model have one matrix, which an adapter on one of them would change for both."""
    policy = save_tiny_policy(tmp_path / "policy", seed=3, sharpness=3.0, tie_word_embeddings=tied)
    data = write_data(tmp_path / "d.json", make_instances())
    more = {"use_lora": True, "lora_target_modules": targets, "learning_rate": 1e-2, "num_train_epochs": 5}
    train((policy, policy), data, tmp_path / "out", **more)
    base = LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter"))
    saved = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (saved - adapted).abs().max() < 1e-4 < 1e-2 < (saved - before).abs().max()


def test_a_merge_that_changes_the_model_is_refused(models, tmp_path, monkeypatch):
    """The folder gets its name only after the saved model's logits were compared."""
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    data = write_data(tmp_path / "d.json", make_instances())
    with pytest.raises(UserError, match="logits"):
        train(models, data, tmp_path / "out", use_lora=True, learning_rate=1e-2, num_train_epochs=3)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()


def test_anything_but_an_adapter_is_left_alone(models, tmp_path):
    for name in (str(models[0]), "owner/name", "./nowhere", str(tmp_path)):
        assert whole_model(name, "policy") == name


def test_an_adapter_is_merged_once_and_loaded_by_every_loader(models, tmp_path, capsys, cache):
    wanted = save_adapter(models[0], tmp_path / "adapter")
    name = str(tmp_path / "adapter")
    assert torch.allclose(logits(load_causal_lm(name, "policy", "float32")), wanted, atol=1e-4)
    assert load_config(name, "policy").model_type == "llama"
    assert load_tokenizer(name, "policy").get_vocab() == load_tokenizer(str(models[0]), "policy").get_vocab()
    assert capsys.readouterr().out.count("merging the adapter") == 1
    first = whole_model(name, "policy")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [first.rsplit("/", 1)[1]]
    shutil.copytree(name, tmp_path / "copy")
    assert whole_model(str(tmp_path / "copy"), "policy") == first  # known by content
    save_adapter(models[1], tmp_path / "adapter")
    assert whole_model(name, "policy") != first


def in_hub_cache(folder, hub, name):
    """Put a folder's files where huggingface_hub keeps those of `name`: blobs, and links in a snapshot."""
    commit, repo = "0" * 40, hub / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    for made in (snapshot, repo / "blobs", repo / "refs"):
        made.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        shutil.copy(path, repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def test_adapter_and_base_may_be_hub_names(models, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    wanted = save_adapter(models[0], tmp_path / "adapter")
    in_hub_cache(models[0], tmp_path / "hub", "owner/base")
    snapshot = in_hub_cache(tmp_path / "adapter", tmp_path / "hub", "owner/adapter")
    change_config(snapshot, base_model_name_or_path="owner/base")
    assert whole_model("owner/base", "policy") == "owner/base"
    whole = LlamaForCausalLM.from_pretrained(whole_model("owner/adapter", "policy"), dtype=torch.float32)
    assert torch.allclose(logits(whole), wanted, atol=1e-4)
    (snapshot / "adapter_model.safetensors").unlink()
    adapters.hub_folder.cache_clear()
    with pytest.raises(UserError, match="owner/adapter") as raised:
        whole_model("owner/adapter", "policy")
    assert "\n" not in str(raised.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, with an empty cache; `answer` holds its next answer's code and headers."""
    adapters.hub_folder.cache_clear()
    answer = {"code": 200, "headers": {}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(answer["code"])
            for name, value in answer["headers"].items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_HEAD
        log_message = lambda *_: None  # noqa: E731

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answer["server"] = server
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # before it tries again
    yield answer
    server.shutdown()
    server.server_close()
    adapters.hub_folder.cache_clear()


NO_FILE = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "0" * 40}


@pytest.mark.parametrize(
    ("code", "headers"), [(404, NO_FILE), (404, {"X-Error-Code": "RepoNotFound"}), (404, {}), (401, {})]
)
def test_what_the_hub_does_not_have_is_no_adapter(hub, code, headers):
    hub |= {"code": code, "headers": headers}
    assert whole_model("owner/whole", "policy") == "owner/whole"


@pytest.mark.parametrize("failure", [503, 429, "closed"])
def test_a_network_that_fails_says_nothing_of_adapters(hub, failure, monkeypatch):
    if failure == "closed":
        hub["server"].shutdown()
        hub["server"].server_close()
    else:
        hub["code"] = failure
    with pytest.raises(UserError, match="owner/any: the hub does not say whether it is an adapter") as raised:
        whole_model("owner/any", "policy")
    assert "\n" not in str(raised.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert whole_model("owner/any", "policy") == "owner/any"  # the cache holds none


def test_what_the_hub_has_once_said_is_remembered_when_the_network_fails(hub):
    hub |= {"code": 404, "headers": NO_FILE}
    whole_model("owner/whole", "policy")
    adapters.hub_folder.cache_clear()
    hub |= {"code": 503, "headers": {}}
    assert whole_model("owner/whole", "policy") == "owner/whole"


def test_a_configuration_beside_the_adapter_is_the_bases(models, tmp_path):
    wanted = save_adapter(models[0], tmp_path / "adapter")
    shutil.copy(models[0] / "config.json", tmp_path / "adapter")
    got = logits(load_causal_lm(str(tmp_path / "adapter"), "policy", "float32"))
    assert torch.allclose(got, wanted, atol=1e-4)
    change_config(tmp_path / "adapter", lora_alpha=80)
    base = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert not torch.allclose(got, wanted, atol=1e-2)
    got = logits(load_causal_lm(str(tmp_path / "adapter"), "policy", "float32"))
    assert torch.allclose(got, wanted, atol=1e-4)


def test_files_are_hashed_once_as_long_as_they_stay_the_same(models, tmp_path, monkeypatch):
    save_adapter(models[0], tmp_path / "adapter")
    whole_model(str(tmp_path / "adapter"), "policy")
    with monkeypatch.context() as patched:
        patched.delattr(adapters, "folder_sha256")
        whole_model(str(tmp_path / "adapter"), "policy")


@pytest.mark.parametrize("kind", ["whole weights", "pickled", "no base", "lost base", "itself", "other task", "torn"])
def test_ambiguous_folders_are_one_line(models, tmp_path, kind):
    folder = tmp_path / "adapter"
    save_adapter(models[0], folder)
    if kind == "whole weights":
        shutil.copy(models[0] / "model.safetensors", folder)
    elif kind == "pickled":
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    elif kind == "torn":
        whole = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(whole[:100])
    else:
        change_config(
            folder,
            **{
                "no base": {"base_model_name_or_path": None},
                "lost base": {"base_model_name_or_path": str(tmp_path / "nowhere")},
                "itself": {"base_model_name_or_path": str(folder)},
                "other task": {"task_type": "SEQ_CLS"},
            }[kind],
        )
    with pytest.raises(UserError) as raised:
        load_causal_lm(str(folder), "policy", "float32")
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_an_adapter_of_an_adapter(models, tmp_path):
    save_adapter(models[0], tmp_path / "one")
    whole = whole_model(str(tmp_path / "one"), "policy")
    wanted = save_adapter(whole, tmp_path / "two", targets=("v_proj",))
    change_config(tmp_path / "two", base_model_name_or_path=str(tmp_path / "one"))
    assert torch.allclose(logits(load_causal_lm(str(tmp_path / "two"), "policy", "float32")), wanted, atol=1e-4)


def test_lora_from_end_to_end(models, tmp_path):
    """Three stages as a user starts them: generate with an adapter as policy, annotate, train an adapter on top."""
    from tiny import save_tiny_reward_model

    save_adapter(models[0], tmp_path / "policy")
    reward = save_tiny_reward_model(tmp_path / "reward", 3)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{a} cat."}) + "\n" for a in "abcdef"))
    variables = {"HF_HOME": tmp_path / "hf"}
    stages = [
        ("generation/generate.py", "--model_name_or_path", tmp_path / "policy", "--ref_model_name_or_path", models[0],
         "--dataset_name_or_path", tmp_path / "p.jsonl", "--sampler", "mixp", "--backend", "hf", "--temperature", 1,
         "--max_new_tokens", 8, "--max_input_length", 16, "--output_file", tmp_path / "gen.json"),
        ("annotate_data/get_rewards.py", "--dataset_name_or_path", tmp_path / "gen.json", "--reward_name_or_path",
         reward, "--output_file", tmp_path / "rewards.json"),
        ("dpo_iteration/run_dpo.py", *flags((tmp_path / "policy", models[0]), tmp_path / "rewards.json",
         tmp_path / "out", use_lora=True, learning_rate=1e-2)),
    ]  # fmt: skip
    for script, *words in stages:
        result = python(script, *words, **variables)
        assert result.returncode == 0, result.stderr
    printed = result.stdout
    assert "response_ids" not in printed  # they were there, and of the policy's tokenizer
    base = LlamaForCausalLM.from_pretrained(whole_model(str(tmp_path / "policy"), "policy"), dtype=torch.float32)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter"))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), adapted, atol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "policy")


def test_four_bit_training_saves_what_it_trained(tmp_path):
    """QLoRA: the saved model is the 4-bit base, widened, with the adapter; not the base that was rounded."""
    pytest.importorskip("bitsandbytes")
    from dpo_iteration.policy import four_bit_config

    # 64: bitsandbytes' CPU kernels take no matrix that is narrower than its blocks.
    models = [save_tiny_policy(tmp_path / name, seed, hidden=64) for seed, name in enumerate("pr")]
    data = write_data(tmp_path / "d.json", make_instances())
    more = {"use_lora": True, "load_in_4bit": True, "learning_rate": 1e-2, "num_train_epochs": 3}
    got = train(models, data, tmp_path / "out", **more)
    assert got[-1] < got[0]
    base = AutoModelForCausalLM.from_pretrained(
        models[0], dtype=torch.float32, quantization_config=four_bit_config("float32")
    )
    # In training mode: else bitsandbytes' CPU kernels round what they multiply to bfloat16.
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").train()(IDS).logits.detach()
    saved = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (saved - adapted).abs().max() < 1e-3
    assert (logits(AutoModelForCausalLM.from_pretrained(models[0])) - saved).abs().max() > 0.05
