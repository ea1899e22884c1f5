"""Rewards of replies from a reward model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from pipeline.base.errors import ConfigError, is_out_of_memory, one_line
from pipeline.data.pairs import Message
from pipeline.data.rendering import TemplateError, apply_template
from pipeline.models.files import NamedModel

__all__ = ["load_reward_model"]


def load_reward_model(name: str, device: torch.device) -> Callable[[str | list[Message], Sequence[str]], list[float]]:
    """Load a sequence classifier with one output, which is the reward.

    The tokenizer's chat template joins prompt and reply. Without a template they are two texts if the tokenizer has a
    separator, and one concatenated text otherwise.

    Returns:
        Function of a prompt, text or messages, and of replies to it, that gives the reward of each reply.

    Raises:
        ConfigError: The model can't be loaded, or has another number of outputs.
    """
    folder = NamedModel(name, None, "--reward-model").folder()
    try:
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        reason = one_line(str(error))
        raise ConfigError(f"--reward-model: must be a sequence classifier, got {name} ({reason})") from error
    model, report = model
    if report["missing_keys"]:
        # transformers would give a language model without a head a random one.
        raise ConfigError(f"--reward-model: must have weights {min(report['missing_keys'])}, got {name} without them")
    if model.config.num_labels != 1:
        raise ConfigError(f"--reward-model: must have one output, got {name} with {model.config.num_labels}")
    model = model.to(device).eval()

    def reward(prompt: str | list[Message], replies: Sequence[str]) -> list[float]:
        # One reply at a time: many classifiers find the last token by a padding token that they lack.
        with torch.inference_mode():
            return [float(model(**_encode(tokenizer, prompt, reply).to(device)).logits[0, 0]) for reply in replies]

    return reward


def _encode(tokenizer: Any, prompt: str | list[Message], reply: str) -> Any:
    if tokenizer.chat_template is not None:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*asked, {"role": "assistant", "content": reply}]
        try:
            ((text, _),) = apply_template(tokenizer, [(messages, False)], {})
        except TemplateError as error:
            raise ConfigError(
                f"--reward-model: must have a chat template that takes the prompts, got {error}"
            ) from error
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")
    text = prompt if isinstance(prompt, str) else "\n\n".join(str(message.get("content")) for message in prompt)
    if tokenizer.sep_token is not None:
        return tokenizer(text, reply, return_tensors="pt")
    return tokenizer(text + reply, return_tensors="pt")
