"""Models by folder or hub name, their adapters, and dropout."""

import dataclasses
import importlib.util
import json
import os
import shutil
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
import transformers

from pipeline.base.digests import sha256_of_file
from pipeline.base.errors import ConfigError, DataError
from pipeline.config.data import DataConfig
from pipeline.config.schema import (
    Config,
    Ia3Settings,
    LoraSettings,
    PolicyConfig,
    PrecomputeConfig,
    Quantization,
    ReferenceConfig,
)
from pipeline.data.tokens import TokenizedPair
from pipeline.models.files import (
    NamedModel,
    find_adapter,
    in_one_process,
    load_tokenizer,
    reference_quantization,
    reference_sources,
    reference_weights,
)
from pipeline.models.loading import disable_dropout, load_policy, load_reference, pick_device
from pipeline.scoring.forward import input_device, prepare, score
from pipeline.scoring.packing import pad_pairs
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.selfcheck import check_scoring
from support.models import make_model, make_tokenizer
from support.tally import tally

BATCH = pad_pairs([TokenizedPair(prompt_ids=[0, 10, 11], chosen_ids=[12, 13], rejected_ids=[14, 15, 16])], pad_id=2)


def settings(policy: PolicyConfig, reference: ReferenceConfig | None = None) -> Config:
    return Config(
        data=DataConfig(path="unused"),
        policy=policy,
        reference=reference or ReferenceConfig(),
        precompute=PrecomputeConfig(output="unused"),
    )


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return score(model, BATCH).tokens.logps


@pytest.fixture
def adapter_folder(model_folder: Path, tmp_path: Path) -> Path:
    """An adapter that changes the model: its second factor is not zero."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_hub_name_is_fetched_and_a_folder_is_not(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, revision: str | None = None, **kwargs: Any) -> str:
        calls.append((name, revision))
        assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in kwargs["allow_patterns"])
        return str(model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert NamedModel("org/name", "v1", "policy.model").folder() == model_folder
    assert calls == [("org/name", "v1")]
    assert NamedModel(str(model_folder), None, "policy.model").folder() == model_folder
    assert len(calls) == 1


def test_an_adapter_trained_on_a_hub_model_names_the_hub_model_as_its_base(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(model_folder))
    policy = load_policy(settings(PolicyConfig(model="org/name", lora=LoraSettings(r=2))))
    policy.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "org/name"


@pytest.mark.parametrize("name", ["./no/such/folder", "no/such/folder/here", ""])
def test_a_missing_folder_is_refused_by_its_key_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match=r"reference\.model: .*no such model folder"):
        NamedModel(name, None, "reference.model").folder()


def test_a_hub_that_can_not_be_reached_for_digests_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectError(Exception):
        """Error of the hub's client, which is no OSError."""

    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask)
    with pytest.raises(
        ConfigError, match=r"^policy\.model: 'org/name' is neither a folder here nor a model on the hub: "
    ):
        reference_weights(NamedModel("org/name", None, "policy.model"))


def test_an_unreachable_hub_model_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"policy\.model: 'org/none' is neither a folder here nor"):
        NamedModel("org/none", None, "policy.model").folder()


def test_a_folder_without_safetensors_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        NamedModel(str(folder), None, "policy.model").folder()
    with pytest.raises(ConfigError, match="no PEFT adapter"):
        find_adapter(str(folder), "policy.adapter")


def test_an_adapter_given_as_a_model_is_told_where_it_belongs(adapter_folder: Path) -> None:
    with pytest.raises(ConfigError, match="name that with the key `adapter`"):
        NamedModel(str(adapter_folder), None, "policy.model").folder()


def test_damaged_weights_are_named(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"policy\.model: .*damaged"):
        load_policy(settings(PolicyConfig(model=str(folder))))


def test_the_reference_is_the_policy_before_training_unless_named(model_folder: Path, adapter_folder: Path) -> None:
    plain = PolicyConfig(model=str(model_folder))
    continued = PolicyConfig(model=str(model_folder), adapter=str(adapter_folder))
    by_default = NamedModel(str(model_folder), None, "policy.model")
    assert reference_sources(settings(plain)) == (by_default, None)
    assert reference_sources(settings(continued)) == (by_default, adapter_folder)
    assert reference_sources(settings(continued, ReferenceConfig(disable_adapters=True))) == (by_default, None)
    named = ReferenceConfig(model="other", revision="r2", adapter=str(adapter_folder))
    assert reference_sources(settings(plain, named)) == (NamedModel("other", "r2", "reference.model"), adapter_folder)
    # Another reference has nothing to do with the policy's adapter.
    assert reference_sources(settings(continued, ReferenceConfig(model="other")))[1] is None


def test_a_reference_with_an_adapter_scores_as_the_policy_that_continues_it(
    model_folder: Path, adapter_folder: Path
) -> None:
    continued = settings(PolicyConfig(model=str(model_folder), adapter=str(adapter_folder)))
    base_only = settings(
        PolicyConfig(model=str(model_folder), adapter=str(adapter_folder)), ReferenceConfig(disable_adapters=True)
    )
    models = [load_policy(continued).eval(), *(load_reference(c, torch.device("cpu")) for c in (continued, base_only))]
    for model in models:
        prepare(model)
    policy, reference, base = map(logps, models)
    torch.testing.assert_close(policy, reference)
    assert (policy - base).abs().max() > 0.01
    assert any(p.requires_grad for p in models[0].parameters())
    assert not any(p.requires_grad for p in models[1].parameters())
    assert not models[1].training


SOMEWHERE_ELSE = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


def spread(config: Config, places: Any = "auto") -> Config:
    precompute = dataclasses.replace(config.precompute, device_map="auto")
    # The setting has one value; what the library makes of it on a machine with GPUs stands in for it here.
    object.__setattr__(precompute, "device_map", places)
    return dataclasses.replace(config, precompute=precompute)


def pair_logps(model: Any) -> list[Any]:
    pairs = [
        TokenizedPair(prompt_ids=[3 + i, 4, 5], chosen_ids=[6 + i, 7, 8], rejected_ids=[9, 10 + i]) for i in range(5)
    ]
    prepare(model)
    assert check_scoring(model, "reference.model") == "packed"
    scorer = Scorer(model=model, reading="packed", pad_id=0, key="reference.model", tokens_per_batch=64)
    return [logps.tolist() for _, *both in scorer.logps(pairs) for logps in both]


@pytest.mark.parametrize(
    ("gpus", "settings", "wanted"),
    [
        (0, {}, None),
        (1, {}, None),
        (2, {}, "auto"),
        (1, {"device_map": "auto"}, "auto"),
        (1, {"tp_plan": "auto"}, "auto"),
    ],
)
def test_one_process_has_the_reference_to_itself_on_all_gpus(
    gpus: int, settings: dict[str, Any], wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = Config(
        data=DataConfig(path="x"),
        policy=PolicyConfig(model="x"),
        precompute=PrecomputeConfig(output="x", **settings),
    )
    alone = in_one_process(config).precompute
    assert (alone.tp_plan, alone.device_map) == (None, wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("places", ["auto", SOMEWHERE_ELSE], ids=["auto on a CPU", "fetched for every batch"])
def test_a_reference_that_is_spread_gives_the_same_log_probs_to_the_bit(
    tmp_path: Path, tokenizer: Any, places: Any, tied: bool
) -> None:
    config = settings(PolicyConfig(model=str(make_model(tmp_path, tokenizer, tie_word_embeddings=tied))))
    model = load_reference(spread(config, places), torch.device("cpu"))
    place = "meta" if places is SOMEWHERE_ELSE else "cpu"
    assert {model.get_output_embeddings().weight.device.type, next(model.parameters()).device.type} == {place}
    assert input_device(model) == torch.device("cpu")
    assert pair_logps(model) == pair_logps(load_reference(config, torch.device("cpu")))
    # What was fetched for the head is gone again.
    assert model.get_output_embeddings().weight.device.type == place


def test_a_reference_that_can_not_be_spread_is_refused(
    model_folder: Path, adapter_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = settings(PolicyConfig(model=str(model_folder), adapter=str(adapter_folder)))
    with pytest.raises(ConfigError, match="does not fit the GPUs here, and weights that are kept elsewhere take no"):
        load_reference(spread(adapted, SOMEWHERE_ELSE), torch.device("cpu"))
    load_reference(spread(adapted), torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="each of several processes would spread the reference over all GPUs"):
        load_reference(spread(adapted), torch.device("cpu"))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="this machine shows 2 GPUs, and process 2 of it, counted from 0, has none"):
        pick_device()


def test_a_fresh_adapter_changes_nothing_yet(model_folder: Path) -> None:
    plain = load_policy(settings(PolicyConfig(model=str(model_folder)))).eval()
    fresh = load_policy(settings(PolicyConfig(model=str(model_folder), lora=LoraSettings(r=4)))).eval()
    prepare(plain)
    prepare(fresh)
    torch.testing.assert_close(logps(plain), logps(fresh), atol=1e-6, rtol=0)


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoraSettings(r=4)},
    "rslora": {"lora": LoraSettings(r=4, rslora=True)},
    "dora": {"lora": LoraSettings(r=4, dora=True)},
    "lora beside modules trained whole": {"lora": LoraSettings(r=4, modules_to_save=["embed_tokens", "norm"])},
    "lora on named layers": {"lora": LoraSettings(r=4, target_modules=["q_proj", "down_proj"])},
    "ia3": {"ia3": Ia3Settings()},
    "ia3 on named layers": {"ia3": Ia3Settings(target_modules=["k_proj", "down_proj"])},
    "ia3 with feed-forward layers": {
        "ia3": Ia3Settings(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    },
}


def all_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_fresh_adapter_of_any_kind_changes_nothing_until_it_is_trained(model_folder: Path, kind: str) -> None:
    plain = load_policy(settings(PolicyConfig(model=str(model_folder)))).eval()
    fresh = load_policy(settings(PolicyConfig(model=str(model_folder), **ADAPTERS[kind]))).eval()
    base, adapted = all_logits(plain), all_logits(fresh)
    # DoRA divides by a norm that it computes from the weights, and multiplies by the same.
    torch.testing.assert_close(adapted, base, atol=1e-5, rtol=0)
    trainable = {name: p for name, p in fresh.named_parameters() if p.requires_grad}
    assert 0 < sum(p.numel() for p in trainable.values()) < sum(p.numel() for p in plain.parameters())
    fresh.train()
    logits = fresh(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask).logits
    gradients = torch.autograd.grad(logits.square().sum(), list(trainable.values()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    with torch.no_grad():
        for parameter, gradient in zip(trainable.values(), gradients, strict=True):
            if gradient is not None:
                parameter -= 0.1 * gradient.sign()
    fresh.eval()
    assert (all_logits(fresh) - base).abs().max() > 0.01
    with fresh.disable_adapter():
        torch.testing.assert_close(all_logits(fresh), base, atol=1e-5, rtol=0)


def test_each_setting_of_an_adapter_reaches_it(model_folder: Path) -> None:
    def made(**adapter: Any) -> Any:
        return load_policy(settings(PolicyConfig(model=str(model_folder), **adapter))).peft_config["default"]

    lora = made(lora=LoraSettings(r=4, alpha=6.0, dropout=0.25, rslora=True, dora=True, modules_to_save=["norm"]))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora, lora.use_dora) == (4, 6.0, 0.25, True, True)
    assert lora.modules_to_save == ["norm"]
    ia3 = made(ia3=Ia3Settings(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    assert (set(ia3.target_modules), set(ia3.feedforward_modules)) == ({"k_proj", "down_proj"}, {"down_proj"})
    assert not made(ia3=Ia3Settings(target_modules=["k_proj"])).feedforward_modules
    # Left out, the library's choice for the architecture.
    assert set(made(ia3=Ia3Settings()).target_modules) == {"k_proj", "v_proj", "down_proj"}


def test_rslora_scales_by_the_root_of_the_rank(model_folder: Path) -> None:
    for rslora, scale in ((False, 8 / 4), (True, 8 / 2)):
        lora = LoraSettings(r=4, alpha=8.0, rslora=rslora)
        policy = load_policy(settings(PolicyConfig(model=str(model_folder), lora=lora)))
        scales = {m.scaling["default"] for m in policy.modules() if hasattr(m, "lora_A")}
        assert scales == {scale}


@pytest.mark.parametrize(
    ("adapter", "key"),
    [
        ({"lora": LoraSettings(target_modules=["no_such_layer"])}, "policy.lora"),
        ({"ia3": Ia3Settings(target_modules=["no_such_layer"])}, "policy.ia3"),
    ],
    ids=["lora", "ia3"],
)
def test_an_adapter_on_layers_that_are_not_there_is_refused_by_its_key(
    model_folder: Path, adapter: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}.target_modules: .*no_such_layer"):
        load_policy(settings(PolicyConfig(model=str(model_folder), **adapter)))


# Quantization.

QUANTIZATIONS = {
    "4 bits": Quantization(bits=4),
    "4 bits, fp4": Quantization(bits=4, type="fp4"),
    "4 bits, scales too": Quantization(bits=4, double=True),
    "8 bits": Quantization(bits=8),
}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model whose every layer is some blocks of 64 weights wide, as bitsandbytes needs on a CPU."""
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    return make_model(tmp_path_factory.mktemp("wide"), tokenizer, **sizes)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_policy_and_reference_are_quantized_alike(wide_folder: Path, kind: str) -> None:
    quantized = QUANTIZATIONS[kind]
    config = settings(PolicyConfig(model=str(wide_folder), lora=LoraSettings(r=4), quantization=quantized))
    policy, reference = load_policy(config).eval(), load_reference(config, torch.device("cpu"))
    full = load_reference(settings(PolicyConfig(model=str(wide_folder))), torch.device("cpu"))
    for model in (policy, reference, full):
        prepare(model)
    check_scoring(policy, "policy.model")
    torch.testing.assert_close(logps(policy), logps(reference), atol=1e-5, rtol=0)
    gap = (logps(reference) - logps(full)).abs().max()
    # Rounded weights are felt, and a model is still what it was.
    assert 1e-4 < gap < 5
    kept = {name for name, p in reference.named_parameters() if p.is_floating_point()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= kept
    assert "model.layers.0.mlp.up_proj.weight" not in kept
    assert all("lora" in name for name, p in policy.named_parameters() if p.requires_grad)


ON_4_BITS: dict[str, dict[str, Any]] = {kind: ADAPTERS[kind] for kind in ("lora", "dora", "ia3")}


@pytest.mark.parametrize("kind", ON_4_BITS)
def test_a_fresh_adapter_on_4_bits_changes_nothing_and_learns_after_an_evaluation_as_before_it(
    wide_folder: Path, kind: str
) -> None:
    """On some CPUs bitsandbytes packs the weights in evaluation, after which no gradient passes through them."""

    def made() -> Any:
        torch.manual_seed(0)
        policy = PolicyConfig(model=str(wide_folder), quantization=Quantization(bits=4, double=True), **ON_4_BITS[kind])
        model = load_policy(settings(policy))
        prepare(model)
        return model

    def gradients(model: Any) -> dict[str, torch.Tensor | None]:
        model.train()
        score(model, BATCH).tokens.logps.sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    at_once = gradients(made())
    evaluated = made()
    check_scoring(evaluated, "policy.model")
    evaluated.eval()
    on = logps(evaluated)
    with evaluated.disable_adapter():
        torch.testing.assert_close(logps(evaluated), on, atol=1e-4, rtol=0)
    for name, after in gradients(evaluated).items():
        before = at_once[name]
        assert before is not None and after is not None, name
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_each_setting_of_a_quantization_reaches_the_library(wide_folder: Path) -> None:
    def made(**changes: Any) -> Any:
        reference = ReferenceConfig(dtype="bfloat16", quantization=Quantization(**changes))
        config = settings(PolicyConfig(model=str(wide_folder)), reference)
        return load_reference(config, torch.device("cpu")).config.quantization_config

    four = made(bits=4, type="fp4", double=True)
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "fp4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    eight = made(bits=8)
    assert (eight.load_in_4bit, eight.load_in_8bit) == (False, True)


def test_the_references_quantization_is_the_policys_only_where_its_model_is(model_folder: Path) -> None:
    policy = PolicyConfig(model=str(model_folder), lora=LoraSettings(), quantization=Quantization(bits=4))
    eight = Quantization(bits=8)
    assert reference_quantization(settings(policy)) == Quantization(bits=4)
    assert reference_quantization(settings(policy, ReferenceConfig(model="other"))) is None
    assert reference_quantization(settings(policy, ReferenceConfig(quantization=eight))) == eight
    assert reference_quantization(settings(policy, ReferenceConfig(model="other", quantization=eight))) == eight
    assert reference_quantization(settings(PolicyConfig(model=str(model_folder)))) is None


def test_quantization_without_bitsandbytes_names_what_to_install(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    policy = PolicyConfig(model=str(model_folder), lora=LoraSettings(), quantization=Quantization(bits=4))
    message = r"quantization: needs bitsandbytes, .* pip install 'refshard\[quantization\]'"
    with pytest.raises(ConfigError, match=rf"^policy\.{message}") as caught:
        load_policy(settings(policy))
    assert caught.value.exit_status == 2
    reference = ReferenceConfig(model=str(model_folder), quantization=Quantization(bits=8))
    with pytest.raises(ConfigError, match=rf"^reference\.{message}"):
        load_reference(settings(PolicyConfig(model=str(model_folder)), reference), torch.device("cpu"))
    own = ReferenceConfig(quantization=Quantization(bits=8))
    with pytest.raises(ConfigError, match=rf"^reference\.{message}"):
        load_reference(settings(PolicyConfig(model=str(model_folder)), own), torch.device("cpu"))


def test_dropout_is_off_in_modules_and_in_attention_but_not_in_the_saved_config_or_the_adapter(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    folder = make_model(tmp_path / "dropping", tokenizer, attention_dropout=0.5)
    policy = load_policy(settings(PolicyConfig(model=str(folder), lora=LoraSettings(r=2, dropout=0.25))))
    assert policy.get_base_model().config.attention_dropout == 0.5
    rates = {m.p for name, m in policy.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in name}
    assert rates == {0.25}
    plain = load_policy(settings(PolicyConfig(model=str(folder)))).train()
    prepare(plain)
    torch.testing.assert_close(logps(plain), logps(plain), atol=0, rtol=0)

    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=32))
    assert any(m.p > 0 for m in gpt2.modules() if isinstance(m, torch.nn.Dropout))
    disable_dropout(gpt2)
    assert all(m.p == 0 for m in gpt2.modules() if isinstance(m, torch.nn.Dropout))


def test_the_dtype_is_float32_for_policy_and_reference_whatever_the_checkpoint_has(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    folder = make_model(tmp_path / "half", tokenizer)
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    config = settings(PolicyConfig(model=str(folder)))
    assert load_reference(config, torch.device("cpu")).dtype == torch.float32
    assert load_policy(config).dtype == torch.float32


def test_a_broken_tokenizer_is_refused_by_its_key(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"policy\.model: .*tokenizer"):
        load_tokenizer(settings(PolicyConfig(model=str(folder))))


def test_weights_that_stay_on_the_hub_have_the_digests_of_a_local_copy(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage two never fetches another reference's weights; the hub's own digests say whether it changed."""

    class Api:
        def model_info(self, name: str, revision: str | None, files_metadata: bool) -> Any:
            assert (name, revision, files_metadata) == ("org/name", "v1", True)
            files = [
                types.SimpleNamespace(
                    rfilename=file.name,
                    lfs=types.SimpleNamespace(sha256=sha256_of_file(file)) if file.suffix == ".safetensors" else None,
                )
                for file in model_folder.iterdir()
            ]
            return types.SimpleNamespace(sha="c0ffee", siblings=files)

    def hf_hub_download(name: str, file: str, revision: str) -> str:
        assert (file, revision) == ("config.json", "c0ffee")
        return str(model_folder / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    on_hub = reference_weights(NamedModel("org/name", "v1", "reference.model"))
    assert on_hub == reference_weights(NamedModel(str(model_folder), None, "reference.model"))
    assert list(on_hub[1]) == ["model.safetensors"]


# What is loaded is what was digested.


def test_a_model_with_an_adapter_beside_its_weights_is_refused_by_both_names(
    model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "both")
    shutil.copy(adapter_folder / "adapter_config.json", folder)
    with pytest.raises(ConfigError, match=r"^policy\.model: .* holds config\.json and adapter_config\.json"):
        load_policy(settings(PolicyConfig(model=str(folder))))


@pytest.mark.parametrize("named", ["sub/w.safetensors", "../w.safetensors", "/w.safetensors", "w.bin", 5])
def test_weights_that_config_json_names_elsewhere_are_refused(model_folder: Path, tmp_path: Path, named: Any) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "elsewhere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    with pytest.raises(
        ConfigError, match=r"transformers_weights in its config\.json must be a safetensors file beside"
    ):
        NamedModel(str(folder), None, "policy.model").folder()


@pytest.mark.parametrize("changed", [{"num_hidden_layers": 10**7}, {"text_config": {"num_local_experts": 10**8}}])
def test_a_config_of_more_parts_than_memory_holds_is_refused_before_they_are_made(
    model_folder: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(
        ConfigError, match=r"^policy\.model: .* (num_hidden_layers|num_local_experts) .* at most 10,000"
    ):
        NamedModel(str(folder), None, "policy.model").text_config(weights=False)
    tally("a config.json of millions of layers or experts", 1, outcome="2, the key named")


def test_an_index_that_can_be_switched_to_another_file_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "two")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = safetensors.torch.load_file(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}))
    assert NamedModel(str(folder), None, "policy.model").folder() == folder
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(
        ConfigError, match=r"must hold each weight once, got \S+ in a\.safetensors and in b\.safetensors"
    ):
        NamedModel(str(folder), None, "policy.model").folder()


def test_a_loaded_model_does_not_change_with_its_file(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "overwritten")
    for load in (load_policy, lambda config: load_reference(config, torch.device("cpu"))):
        model = load(settings(PolicyConfig(model=str(folder))))
        prepare(model)
        expected = logps(model)
        whole = (folder / "model.safetensors").read_bytes()
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(len(whole) // 2)
            file.write(bytes(len(whole) // 4))
        assert torch.equal(logps(model), expected)
        # Read from a mapped file that is cut, a weight would end the process.
        os.truncate(folder / "model.safetensors", 100)
        assert torch.equal(logps(model), expected)
        (folder / "model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_generation_config_that_the_library_refuses_to_save_is_saved_as_it_came(
    model_folder: Path, tmp_path: Path, file: str
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    there = json.loads((folder / file).read_text()) if file == "config.json" else {}
    (folder / file).write_text(json.dumps({**there, "temperature": 0.9, "top_p": 0.6}, indent=7))
    model = load_policy(settings(PolicyConfig(model=str(folder))))
    # The Trainer gives it the tokenizer's special tokens.
    model.generation_config.pad_token_id = 1
    model.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved" / "generation_config.json"
    assert json.loads(saved.read_text())["temperature"] == 0.9
    assert file == "config.json" or saved.read_bytes() == (folder / file).read_bytes()
