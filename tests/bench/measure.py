"""One measurement of one side in a process of its own; the driver starts it.

python tests/bench/measure.py SIDE PAIRS THREADS WORKLOAD   with WORKLOAD as JSON; the last line is the result
"""

import importlib
import json
import logging
import os
import sys
import warnings


def main() -> None:
    side, count, threads = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    # Before anything brings its own idea of how many there are.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = threads
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    import torch
    from model import matrix_rate
    from workloads import from_json

    torch.set_num_threads(int(threads))
    workload = from_json(json.loads(sys.argv[4]))
    # A side imports its own library alone.
    functions = importlib.import_module("ours" if side == "ours" else "theirs")
    if side == "trl-completions":
        functions.score_completions_only()
    if workload.stage == 1:
        outcome = functions.run_stage_one(workload, count)
    elif side == "ours":
        outcome = functions.run_stage_two(workload, count)
    else:
        outcome = functions.run_stage_two(workload, count, live=side == "trl-live")
    result = {
        **vars(outcome.reading),
        "values": [float(value) for value in outcome.values],
        "matrix_rate": matrix_rate(workload),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
