"""A warm parent: it has imported everything and run nothing, and forks one child for every command it is given.

Reads one JSON request a line from stdin: {"argv": [...], "cwd": DIR, "logs": [FILE, ...], "fault": {...}}. A child for
each log runs `embedtune.cli.run(argv)` on one thread and writes stdout and stderr there; of several, each finds in its
environment what torchrun would put there. Answers {"pids": [n, ...]} at once, then, when all are gone,
{"statuses": [n, ...]}: the exit codes, or minus the signals.
"""

import json
import os
import signal
import socket
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def child(request: dict, rank: int, port: int) -> None:
    """Never returns."""
    code, count = 1, len(request["logs"])
    try:
        os.chdir(request["cwd"])
        if count > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in place.items()}
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
        pids, port = [], free_port()
        for rank in range(len(request["logs"])):
            pids.append(os.fork())
            if pids[-1] == 0:
                child(request, rank, port)
        say({"pids": pids}, lock)
        say({"statuses": [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]}, lock)


if __name__ == "__main__":
    main()
