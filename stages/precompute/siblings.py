"""Copy the log-probs of pairs that another training set of the run has, so that each pair is scored once."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.base.folders import Folder
from pipeline.data.intake import KeptPair
from pipeline.models.identity import differences
from pipeline.store.format import ScoredPair
from pipeline.store.reuse import Reusable, copy_scored, reusable_of
from pipeline.store.store import is_finished, open_store

__all__ = ["Siblings"]


class Siblings:
    """Stores of the training sets of one run.

    They are no part of a store's plan, since sets come and go: a copied log-prob is that of the same reference and
    tokenization, and differs from a new one by the rounding of another batch at most. A store counts once it is
    finished. Until then another worker may score a pair of it a second time.
    """

    def __init__(self, folders: Mapping[str, Folder], identity: Mapping[str, Any]) -> None:
        self._folders = folders if len(folders) > 1 else {}
        self._identity = identity
        self._opened: dict[str, Reusable] = {}

    def copy(self, name: str, pairs: Sequence[KeptPair]) -> dict[int, ScoredPair]:
        """Give the pairs of the set `name` that finished stores of other sets hold, by their index in `pairs`.

        Raises DataError if such a store is damaged.
        """
        copied: dict[int, ScoredPair] = {}
        # In the order of the settings: of two stores with a pair, the same one is copied in every process.
        for other in self._folders:
            left = [i for i in range(len(pairs)) if i not in copied]
            if other != name and (reusable := self._open(other)) is not None:
                found = copy_scored(reusable, [pairs[i] for i in left])
                copied |= {left[i]: scored for i, scored in found.items()}
        return copied

    def _open(self, name: str) -> Reusable | None:
        if name not in self._opened and is_finished(self._folders[name]):
            store = open_store(self._folders[name])
            stored = store.manifest["identity"]
            # Sums can't be copied, and a store of a larger max_length serves its own set alone.
            fits = stored["tokenization"]["token_logps"] and not differences(stored, self._identity, joining=False)
            self._opened[name] = reusable_of([store] if fits and not store.is_imported else [])
        return self._opened.get(name)
