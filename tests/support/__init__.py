"""What the tests share and is no test: models, stores, runs, processes, and what stands in for machines not at hand.

Set before the libraries are imported, which read it as they are.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and threads that wait for each other on a busy machine lose minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
