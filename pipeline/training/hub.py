"""Push a policy to the Hugging Face hub: weights, tokenizer, card and settings, and nothing else of a run's folder.

The library would push the whole folder: joined data, token log-probs, and its arguments with the token in them.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError

from pipeline.base.errors import ConfigError, RefshardError, StorageError, first_line
from pipeline.base.progress import say
from pipeline.run.checkpoints import MARKER
from pipeline.run.reading import SETTINGS

__all__ = ["POLICY", "Hub", "HubCallback"]

POLICY = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-[0-9]*-of-[0-9]*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model-[0-9]*-of-[0-9]*.safetensors",
    "adapter_model.safetensors.index.json",
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files that a policy is loaded from, as patterns of names in its folder"""

_PUSHED = (*POLICY, "*.tiktoken", "README.md", SETTINGS)
"""Files that are pushed of a policy's folder"""

_STATE = (
    *("optimizer*.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", MARKER),
    *("latest", "global_step*/*"),
)
"""Files that are pushed besides them of a checkpoint that `train.hub_strategy` wants whole"""


class Hub:
    """The repository that a run's policy is pushed to, in the main process."""

    def __init__(self, arguments: transformers.TrainingArguments) -> None:
        self._arguments = arguments
        # The token is HF_TOKEN's, or that of `hf auth login`.
        self._api = HfApi()
        self._running: list[Future[Any]] = []

    def open(self) -> None:
        """Create the repository unless it exists. Raises StorageError if the hub can't be reached, or refuses."""
        arguments = self._arguments
        name = arguments.hub_model_id or Path(str(arguments.output_dir)).absolute().name
        with _reaching(name):
            made = self._api.create_repo(name, private=arguments.hub_private_repo, exist_ok=True)
            self._repo = made.repo_id

    def push(self, folder: Path, message: str) -> str:
        """Push a policy's folder, once what was begun is done; give the repository's name. Raises StorageError."""
        self.open()
        for running in self._running:
            if (error := running.exception()) is not None:
                say(f"warning: a checkpoint was not pushed to {self._repo} ({first_line(error)})")
        with _reaching(self._repo):
            self._upload(folder, _PUSHED, message)
        return self._repo

    def begin_checkpoint(self, folder: Path) -> None:
        """Begin to push a checkpoint, as `train.hub_strategy` says, unless the one before is still on its way."""
        strategy, busy = self._arguments.hub_strategy, any(not running.done() for running in self._running)
        if strategy == "end" or (busy and not self._arguments.hub_always_push):
            return
        message = f"Training in progress, {folder.name}"
        self._running.append(self._api.run_as_future(self._upload, folder, _PUSHED, message))
        if strategy in ("checkpoint", "all_checkpoints"):
            into = "last-checkpoint/" if strategy == "checkpoint" else f"{folder.name}/"
            self._running.append(self._api.run_as_future(self._upload, folder, (*_PUSHED, *_STATE), message, into))

    def _upload(self, folder: Path, patterns: Sequence[str], message: str, into: str = "") -> None:
        """Upload the files of the patterns in one commit, under the prefix `into`."""
        files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
        added = [CommitOperationAdd(into + file.relative_to(folder).as_posix(), file) for file in files]
        self._api.create_commit(self._repo, added, commit_message=message, revision=self._arguments.hub_revision)


class HubCallback(transformers.TrainerCallback):
    """Pushes each checkpoint once it is committed; for the main process alone."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            self._hub.begin_checkpoint(folder)


@contextmanager
def _reaching(name: str) -> Iterator[None]:
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"train.hub_model_id: must name a repository, got {name} ({first_line(error)})") from error
    except Exception as error:  # the errors of the hub's client have no common type
        if isinstance(error, RefshardError):
            raise
        raise StorageError(
            f"train.push_to_hub: the hub must let this user write to {name}, got {first_line(error)}. Set HF_TOKEN in "
            "the environment, or train.push_to_hub: false, and run the same command again"
        ) from error
