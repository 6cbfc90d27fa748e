"""A warm parent: it has imported everything and run nothing, and forks one child for every command it is given.

Reads one JSON request a line from stdin: {"argv": [...], "cwd": DIR, "log": FILE, "fault": [...]}. The child runs
`embedtune.cli.run(argv)` on one thread and writes stdout and stderr to `log`. Answers {"pid": n} at once, then, when
the child is gone, {"status": n}: the exit code, or minus the signal. A request {"kill": n, "pid": p} sends a signal.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import faults  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import scipy.sparse.csgraph  # noqa: E402, F401
import sentence_transformers.sentence_transformer.losses  # noqa: E402, F401
import tokenizers.trainers  # noqa: E402, F401
import torch  # noqa: E402
import transformers.convert_slow_tokenizer  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402
import transformers.models.bert.modeling_bert  # noqa: E402, F401
import transformers.models.modernbert.modeling_modernbert  # noqa: E402, F401
import transformers.tokenization_utils_tokenizers  # noqa: E402, F401
import tyro  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import embedtune.cli  # noqa: E402
import embedtune.enrich.mine  # noqa: E402, F401
import embedtune.fit.merge  # noqa: E402, F401
import embedtune.fit.objectives.classify  # noqa: E402, F401
import embedtune.fit.objectives.contrastive  # noqa: E402, F401
import embedtune.fit.objectives.prepare  # noqa: E402, F401
import embedtune.fit.objectives.scored  # noqa: E402, F401
import embedtune.fit.objectives.tag  # noqa: E402, F401
import embedtune.judge.page  # noqa: E402, F401
import embedtune.run_labels  # noqa: E402, F401
import embedtune.run_pairs  # noqa: E402, F401
import embedtune.scoring  # noqa: E402, F401
import embedtune.tune  # noqa: E402


def child(request: dict) -> None:
    """Never returns."""
    code = 1
    try:
        os.chdir(request["cwd"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, embedtune.cli._terminated)  # as `main` does
        torch.set_num_threads(1)
        faults.install(request.get("fault"), request.get("plot", False))
        code = embedtune.cli.run(request["argv"])
        faults.report()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def say(message: dict, lock: threading.Lock) -> None:
    with lock:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    get_checkpoint_conversion_mapping("bert")  # compiled once, for all children
    lock = threading.Lock()
    say({"ready": True}, lock)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request)
        say({"pid": pid}, lock)
        _, status = os.waitpid(pid, 0)
        say({"status": os.waitstatus_to_exitcode(status)}, lock)


if __name__ == "__main__":
    main()
