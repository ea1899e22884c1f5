"""A reward model gives replies their rewards."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from pipeline.base.errors import ConfigError, one_line
from pipeline.data.pairs import Message
from pipeline.models.files import find_model

__all__ = [
    "load_reward_model",
]


def load_reward_model(name: str, device: torch.device) -> Callable[[str | list[Message], Sequence[str]], list[float]]:
    """Load a sequence classifier with one output, whose number is the reward.

    Prompt and reply are put together by the chat template of its tokenizer, where it has one; otherwise as two texts,
    if its tokenizer knows how to part them, or else one after the other.

    Args:
        name: Folder or hub name.
        device: Where it computes.

    Returns:
        A function of a prompt, text or messages, and of replies to it, that gives a reward for each reply.

    Raises:
        ConfigError: It can't be loaded, or gives another number of outputs.
    """
    folder = find_model(name, None, "--reward-model")
    try:
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = one_line(str(error))
        raise ConfigError(f"--reward-model {name}: can't be loaded as a sequence classifier: {reason}") from error
    model, report = model
    if report["missing_keys"]:
        # A language model without such a head would get a random one.
        raise ConfigError(f"--reward-model {name}: holds no {min(report['missing_keys'])}, so it is no reward model")
    if model.config.num_labels != 1:
        raise ConfigError(
            f"--reward-model {name}: gives {model.config.num_labels} numbers for a text; a reward model gives one"
        )
    model = model.to(device).eval()

    def reward(prompt: str | list[Message], replies: Sequence[str]) -> list[float]:
        # One at a time: many a classifier finds the last token by a padding token that it does not have.
        with torch.inference_mode():
            return [float(model(**_encode(tokenizer, prompt, reply).to(device)).logits[0, 0]) for reply in replies]

    return reward


def _encode(tokenizer: Any, prompt: str | list[Message], reply: str) -> Any:
    if tokenizer.chat_template is not None:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*asked, {"role": "assistant", "content": reply}]
        return tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    text = prompt if isinstance(prompt, str) else "\n\n".join(str(message.get("content")) for message in prompt)
    if tokenizer.sep_token is not None:
        return tokenizer(text, reply, return_tensors="pt")
    return tokenizer(text + reply, return_tensors="pt")
