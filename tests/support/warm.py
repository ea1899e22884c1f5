"""Imported last by the server of forks, so that no fork pays again for what is the same in all of them.

A command on a tiny model takes a third of a second of the processor. As much again was transformers' table of the
weights' names, compiled at a process's first load of a model, Python's garbage collection of the imported modules, and
what a process reads once: versions, sources, schemas.
"""

import gc
from pathlib import Path

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import pipeline
from pipeline.base import schemas
from pipeline.base.versions import library_versions
from pipeline.config.library import fields_of_training
from pipeline.models.recollection import digest_of_code

get_checkpoint_conversion_mapping("llama")
library_versions()
digest_of_code()
fields_of_training()
for file in Path(pipeline.__path__[0]).glob("*/*.schema.json"):
    schemas._validator(f"pipeline.{file.parent.name}", file.name.removesuffix(".schema.json"))
gc.collect()
gc.freeze()
