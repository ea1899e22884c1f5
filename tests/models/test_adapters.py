"""An adapter that does not fit its model is refused at the start, by the setting's key and with the reason."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

from pipeline.base.errors import ConfigError
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config, Ia3Settings, LoraSettings, PolicyConfig, PrecomputeConfig, ReferenceConfig
from pipeline.models.adapters import check_adapters
from support.models import make_model, make_tokenizer

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}


def check(model: Path, reference: ReferenceConfig | None = None, **policy: Any) -> None:
    config = Config(
        data=DataConfig(path="unused"),
        policy=PolicyConfig(model=str(model), **policy),
        precompute=PrecomputeConfig(output="unused"),
        reference=reference or ReferenceConfig(),
    )
    check_adapters(config)


def save_adapter(model: Path, folder: Path, settings: Any = None, vocabulary: int | None = None) -> Path:
    plain = transformers.AutoModelForCausalLM.from_pretrained(model)
    if vocabulary is not None:
        plain.resize_token_embeddings(vocabulary)
    peft.get_peft_model(plain, settings or peft.LoraConfig(**LORA)).save_pretrained(folder)
    return folder


def refused(key: str, reason: str) -> Any:
    return pytest.raises(ConfigError, match=rf"^{re.escape(key)}: .*{reason}")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"lora": LoraSettings(r=4, target_modules=["q_proj"], modules_to_save=["embed_token"])}, "modules_to_save"),
        ({"lora": LoraSettings(r=4, target_modules=["q_proj", "embed_token"])}, "target_modules"),
        ({"ia3": Ia3Settings(target_modules=["k_proj", "embed_token"], feedforward_modules=[])}, "target_modules"),
    ],
)
def test_a_name_of_no_module_is_refused_though_others_of_the_list_are_there(
    settings: dict[str, Any], key: str, model_folder: Path
) -> None:
    section = next(iter(settings))
    with refused(f"policy.{section}.{key}", "got 'embed_token', of which .* did you mean embed_tokens"):
        check(model_folder, **settings)


def test_settings_that_fit_are_passed(model_folder: Path, tmp_path: Path) -> None:
    check(model_folder)
    check(model_folder, lora=LoraSettings(r=4, target_modules=["layers.0.self_attn.q_proj"], modules_to_save=["norm"]))
    check(model_folder, ia3=Ia3Settings())
    copy = tmp_path / "moved"
    shutil.copytree(model_folder, copy)
    for number, settings in enumerate(
        [
            peft.LoraConfig(**LORA, use_dora=True, modules_to_save=["embed_tokens"]),
            peft.LoraConfig(**{**LORA, "target_modules": "all-linear"}, rank_pattern={"q_proj": 2}),
            peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "not_there", "embed_tokens"]}),
            peft.IA3Config(task_type="CAUSAL_LM"),
        ]
    ):
        adapter = save_adapter(model_folder, tmp_path / str(number), settings)
        check(copy, adapter=str(adapter))
        check(copy, ReferenceConfig(model=str(model_folder), adapter=str(adapter)))


def test_an_adapter_of_another_vocabulary_is_refused_with_both_sizes(model_folder: Path, tmp_path: Path) -> None:
    settings = peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"])
    adapter = save_adapter(model_folder, tmp_path / "adapter", settings, vocabulary=403)
    with refused("policy.adapter", r"size mismatch .*\[403, 32\].*\[400, 32\]"):
        check(model_folder, adapter=str(adapter))
    with refused("reference.adapter", r"size mismatch .*\[403, 32\]"):
        check(model_folder, ReferenceConfig(model=str(model_folder), adapter=str(adapter)))


@pytest.mark.parametrize(("layers", "reason"), [(1, "it lacks .*layers.1"), (3, "no place for .*layers.2")])
def test_an_adapter_of_a_model_of_other_layers_is_refused(
    layers: int, reason: str, model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", tokenizer, num_hidden_layers=layers)
    adapter = save_adapter(other, tmp_path / "adapter")
    shutil.rmtree(other)
    with refused("policy.adapter", reason):
        check(model_folder, adapter=str(adapter))


def test_an_adapter_of_other_weights_of_the_same_shape_is_refused(
    model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", tokenizer, seed=9)
    adapter = save_adapter(other, tmp_path / "adapter")
    with refused("policy.adapter", "which was trained on .*other: its weights are others"):
        check(model_folder, adapter=str(adapter))
    check(other, adapter=str(adapter))
    # A base that is not here can't be compared.
    shutil.rmtree(other)
    check(model_folder, adapter=str(adapter))


@pytest.mark.parametrize(
    "settings",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
)
def test_prompt_learning_is_refused_as_such(settings: Any, model_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(model_folder, tmp_path / "adapter", settings)
    with refused("policy.adapter", "must be an adapter that changes layers.*prompt learning"):
        check(model_folder, adapter=str(adapter))


def test_an_adapter_with_another_template_is_refused(model_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    adapter = save_adapter(model_folder, tmp_path / "adapter")
    tokenizer.save_pretrained(adapter)
    check(model_folder, adapter=str(adapter))
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with refused("policy.adapter", "which holds another chat template. Put its tokenizer files into"):
        check(model_folder, adapter=str(adapter))
    with refused("reference.adapter", "which holds another chat template"):
        check(model_folder, ReferenceConfig(adapter=str(adapter)))


def test_a_model_with_named_templates_takes_an_adapter_with_its_default_one(model_folder: Path, tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", save_adapter(model_folder, tmp_path / "adapter")
    shutil.copytree(model_folder, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "{{ 1 }}"}, {"name": "rag", "template": "{{ 2 }}"}]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (adapter / "chat_template.jinja").write_text("{{ 1 }}")
    check(model, adapter=str(adapter))
    (adapter / "chat_template.jinja").write_text("{{ 2 }}")
    with refused("policy.adapter", "which holds another chat template"):
        check(model, adapter=str(adapter))


def test_an_adapter_with_other_tokens_is_refused_and_one_that_pads_otherwise_is_not(
    model_folder: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(model_folder, tmp_path / "adapter")
    other = make_tokenizer(bos=True)
    other.pad_token = "<|padding|>"
    other.save_pretrained(adapter)
    check(model_folder, adapter=str(adapter))
    other.add_special_tokens({"additional_special_tokens": ["<|end_of_turn|>"]})
    other.save_pretrained(adapter)
    with refused("policy.adapter", "which holds another vocabulary"):
        check(model_folder, adapter=str(adapter))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": LoraSettings(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])},
        {"lora": LoraSettings(r=4, target_modules=["q_proj", "lm_head"])},
        {"ia3": Ia3Settings(target_modules=["k_proj", "lm_head"], feedforward_modules=[])},
    ],
)
def test_an_adapter_on_the_head_is_refused(settings: dict[str, Any], model_folder: Path) -> None:
    with refused(f"policy.{next(iter(settings))}", "must leave the head alone.*Leave lm_head out"):
        check(model_folder, **settings)


def test_a_saved_adapter_on_the_head_is_refused(model_folder: Path, tmp_path: Path) -> None:
    adapter = save_adapter(model_folder, tmp_path / "a", peft.LoraConfig(**LORA, modules_to_save=["lm_head"]))
    for key, policy, reference in (
        ("policy.adapter", {"adapter": str(adapter)}, None),
        ("reference.adapter", {}, ReferenceConfig(adapter=str(adapter))),
    ):
        with refused(key, "must leave the head alone"):
            check(model_folder, reference, **policy)
