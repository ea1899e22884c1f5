"""Settle the date that a chat template is told: a store's own, fixed when the store is created."""

import dataclasses
import datetime
from typing import TYPE_CHECKING

from pipeline.base.folders import open_folder
from pipeline.config.schema import Config
from pipeline.data.dates import asks_for_date
from pipeline.store.format import MANIFEST
from pipeline.store.store import find_stores, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.models.identity import TokenizerFacts

__all__ = ["with_template_date"]


def with_template_date(
    config: Config, tokenizer: "PreTrainedTokenizerBase | TokenizerFacts", *, overwrite: bool = False
) -> Config:
    """Give settings with the date for the chat template, if it asks for one and `data.template_date` does not say it.

    It is that of the first store in `precompute.output` (none of which counts with `overwrite`) or `precompute.reuse`,
    and no date if the store is of a version that recorded none; today's, in UTC, if there is no store.

    Raises:
        DataError: A manifest is damaged.
    """
    if config.data.template_date is not None or not asks_for_date(tokenizer):
        return config
    output = open_folder(config.precompute.output)
    stores = [] if overwrite else [output.child(name) for name in config.data.names]
    stores += [store for reused in config.precompute.reuse for store in find_stores(reused)]
    for folder in stores:
        if folder.size(MANIFEST) is not None:
            date = read_manifest(folder)["identity"]["tokenization"].get("template_date")
            break
    else:
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template_date=date))
