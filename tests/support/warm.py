"""Imported last by the server of forks, so that no fork pays again for what is the same in all of them.

A command on a tiny model takes half a second of the processor. More than half of it was transformers' table of the
weights' names, compiled at a process's first load of a model, and Python's garbage collection of the imported modules.
"""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")
gc.collect()
gc.freeze()
