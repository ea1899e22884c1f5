"""Write docs/families.md: how refshard reads every family of causal language models that transformers has.

python tests/support/families.py           tries every family with a small random model, and writes the page
python tests/support/families.py NAMES     tries these, and prints their lines
"""

import gc
import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.base.errors import ConfigError, one_line
from pipeline.data.tokens import TokenizedPair
from pipeline.scoring import selfcheck
from pipeline.scoring.attention import switch_attention
from pipeline.scoring.forward import LOGPS, prepare, score
from pipeline.scoring.packing import Reading, make_batch, pack_pairs

__all__ = ["LARGEST_GAP", "NAMES", "PAGE", "Row", "page", "row_of", "version"]

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

LARGEST_GAP = 2e-3
"""Largest difference of a log-prob from the model's own, in float32, as a share of 1 nat or of the log-prob"""

LONGEST = 64
"""Tokens of the longest sequence that is tried, above all windows here"""

MOST_PARAMETERS = 2e7

# Given to every config that has the setting.
SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(("intermediate_size", "d_inner", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "mamba_n_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("n_routed_experts", "mamba_d_conv"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("rotary_dim", "state_size", "hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_head", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 97),
    "sliding_window": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Sharp enough that log-probs differ by nats.
    "initializer_range": 0.2,
    "is_decoder": True,
}
# Latent attention, whose heads share nothing.
LATENT = {"num_key_value_heads": 4}
SHARED = {"num_kv_shared_layers": 0}

CHUNKED = {"attention_chunk_size": 24, "no_rope_layers": [1, 0], "floor_scale": 16}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}

# What a family needs besides.
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": LATENT,
    "electra": {"embedding_size": 32},
    "gemma3n_text": {**SHARED, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "granitemoehybrid": MIXED,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": CHUNKED},
    "llama4_text": CHUNKED,
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "minicpm3": LATENT,
    # Its published models' window is longer than any pair.
    "phimoe": {"sliding_window": None},
    "qwen3_5": {"text_config": MIXED},
    "qwen3_5_moe": {"text_config": MIXED},
    "qwen3_5_moe_text": MIXED,
    "qwen3_5_text": MIXED,
    "qwen3_next": MIXED,
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [8, 24], "attn_layers": ["local", "lsh"]},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1},
}

HEAD = """# Families of models

This page lists every family of causal language models in transformers {version}, and how refshard reads its batches.
`tests/support/families.py` makes it: it builds a small random model of each family, and asks the self-check that every
model goes through when it is loaded. Then it compares log-probs with the model's own logits, each sequence alone.

| | what it means |
|---|---|
| packed | One row holds many pairs. A prompt is computed once for all of its completions. |
| cached | A prompt is computed once, and its completions continue from the model's cache (stage one). |
| padded | One row holds one sequence. The numbers are the same; it is slower. |
| refused | The model gives no log-probs that the scorer knows. The first command ends with 2 and says why. |
| not tried | No small model of the family can be made here. The self-check decides when a real one is loaded. |

- The check decides for each model, so a variant may be read in another way than its family here.
- A window that only the mask holds (Phi-MoE, Qwen2-MoE) is packed if `data.max_length` does not exceed it.
- A mixture of experts that trains with its balance loss is padded in stage two.
- Falcon, BLOOM and MPT are not packed, since their attention is code of their own. It takes no function from
  transformers' interface, and BLOOM and MPT add a bias by the distance of tokens in the row.
- Llama 4 is padded, since its layers see chunks, and scale queries by a token's place in the row.

"""


@dataclass(frozen=True)
class Row:
    """One family's line of the table."""

    name: str
    """Its `model_type` in config.json"""
    model_class: str
    reading: str
    why: str = ""
    gap: float = 0.0
    """Largest difference from the model's own log-probs, as a share"""

    def __str__(self) -> str:
        return f"| `{self.name}` | `{self.model_class}` | {self.reading} | {self.why} |"


def version() -> str:
    """Give the library's version up to its second part."""
    return ".".join(transformers.__version__.split(".")[:2])


def settings_of(config_class: Any) -> dict[str, Any]:
    """Give a config class's small settings, those of its parts included."""
    known = config_class().to_dict()
    chosen = {k: v for k, v in SMALL.items() if k in known or k in getattr(config_class, "attribute_map", {})}
    for part, kind in getattr(config_class, "sub_configs", {}).items():
        of_part = known.get(part)
        if isinstance(of_part, dict) and of_part.get("model_type") in CONFIG_MAPPING:
            name = of_part["model_type"]
            chosen[part] = {"model_type": name, **settings_of(CONFIG_MAPPING[name]), **SPECIAL.get(name, {})}
        elif isinstance(kind, type) and kind.__name__ != "AutoConfig":
            chosen[part] = settings_of(kind)
    return chosen


def make_model(name: str) -> Any:
    """Make a family's small random model, in evaluation mode."""
    config_class = CONFIG_MAPPING[name]
    settings = settings_of(config_class)
    for key, value in SPECIAL.get(name, {}).items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    config = config_class(**settings)
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise MemoryError(f"its smallest model here has {count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def row_of(name: str) -> Row:
    """Try a family."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    try:
        model = make_model(name)
    except Exception as error:  # a family may fail in any way
        return Row(name, model_class, "not tried", _short(f"{type(error).__name__}: {error}"))
    prepare(model)
    try:
        reading = selfcheck.check_scoring(model, "", LONGEST)
    except ConfigError as error:
        return Row(name, model_class, "refused", _refusal(str(error)))
    gap = _gap(model, reading)
    return Row(name, model_class, reading, "" if reading == "packed" else _why_not_packed(model), gap)


def _pairs() -> list[TokenizedPair]:
    ids = torch.randint(3, 97, (140,), generator=torch.Generator().manual_seed(5)).tolist()
    return [
        TokenizedPair(prompt_ids=ids[:20], chosen_ids=ids[20:60], rejected_ids=ids[60:61]),
        TokenizedPair(prompt_ids=ids[:20], chosen_ids=ids[61:70], rejected_ids=ids[20:60]),
        TokenizedPair(prompt_ids=ids[70:75], chosen_ids=ids[75:90], rejected_ids=ids[90:97]),
    ]


@torch.no_grad()
def _gap(model: Any, reading: Reading) -> float:
    """Give the largest difference from the log-probs of each sequence alone, without padding."""
    pairs, plain = _pairs(), []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids = torch.tensor([[*pair.prompt_ids, *getattr(pair, side)]])
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), dim=-1)
            plain.append(logps.gather(1, ids[0, 1:, None]).squeeze(1)[len(pair.prompt_ids) - 1 :])
    wanted = torch.cat(plain)
    batch = make_batch(pairs, 0, reading)
    return float(((score(model, batch, LOGPS).tokens.logps - wanted).abs() / wanted.abs().clamp(min=1)).max())


def _why_not_packed(model: Any) -> str:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return "layers of " + ", ".join(sorted(kinds))
    if not switch_attention(model):
        return "attention of its own code"
    batch = pack_pairs(_pairs()[:1])
    try:
        with torch.no_grad():
            first = score(model, batch, LOGPS).tokens.logps
            batch.position_ids.zero_()
            deaf = torch.equal(score(model, batch, LOGPS).tokens.logps, first)
    except (LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return _short(str(error).removeprefix("packed attention does not support "))
    return "positions by place in the row" if deaf else "layers that are not attention alone"


def _refusal(message: str) -> str:
    for part, why in (
        ("makes its logits in a way", "a head that is more than a projection"),
        ("sees tokens that come later", "it sees later tokens"),
    ):
        if part in message:
            return why
    return _short(re.sub(r".*can't be run as a causal language model \((.*)\); this.*", r"\1", message))


def _short(message: str) -> str:
    return one_line(message)[:120].replace("|", "/").rstrip(" .")


def page() -> tuple[str, list[Row]]:
    """Try every family; give the page and its rows."""
    rows = []
    for name in sorted(NAMES):
        rows.append(row_of(name))
        gc.collect()
    counts = Counter(row.reading for row in rows)
    said = ", ".join(f"{counts[kind]} {kind}" for kind in ("packed", "cached", "padded", "refused", "not tried"))
    lines = [
        HEAD.format(version=version()) + f"Of {len(rows)} families: {said}.",
        "",
        "| `model_type` | class | read | why |",
        "|---|---|---|---|",
        *map(str, rows),
    ]
    return "\n".join(lines) + "\n", rows


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            row = row_of(name)
            print(row, f"{row.gap:.1e}", flush=True)
        return
    text, rows = page()
    PAGE.write_text(text, encoding="utf-8")
    for row in rows:
        if not row.gap <= LARGEST_GAP:
            print(f"{row.name}: differs by {row.gap:.1e} from its own log-probs")


if __name__ == "__main__":
    main()
