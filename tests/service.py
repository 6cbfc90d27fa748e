"""A service on 127.0.0.1 that answers as an OpenAI-compatible one does, or as badly as it is told to."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def vector(text: str, dimension: int = 8) -> list[float]:
    """The vector that the service gives a text."""
    digest = hashlib.sha256(text.encode()).digest()
    return [(byte - 128) / 64 for byte in digest[:dimension]]


class Service:
    """`script` holds what becomes of the next requests, in turn; None, or an empty script, is a good answer.

    An entry is (status, headers, body), or "torn" for a connection that breaks off within the body, or a function of
    the request's JSON that gives the answer's. `most` texts or `longest` characters and more are refused.
    """

    def __init__(self):
        self.script, self.requests, self.most, self.longest = [], [], None, None
        self.reply = self.embeddings
        self.lock = threading.Lock()
        self.address = ""

    def embeddings(self, asked):
        texts = asked["input"]
        if self.most and len(texts) > self.most:
            return 413, {}, {"error": {"message": f"batch size {len(texts)} > maximum allowed batch size {self.most}"}}
        if self.longest and max(map(len, texts)) > self.longest:
            return 400, {}, {"error": {"message": "This model's maximum context length is exceeded."}}
        data = [{"object": "embedding", "index": i, "embedding": vector(text)} for i, text in enumerate(texts)]
        tokens = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data[::-1], "model": asked["model"], "usage": usage}

    def answer(self, asked):
        with self.lock:
            self.requests.append(asked)
            step = self.script.pop(0) if self.script else None
        step = self.reply if step is None else step
        return step(asked) if callable(step) else step


@contextmanager
def serve():
    """A running Service; `address` is where."""
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found = service.answer(asked | {"path": self.path, "headers": headers})
            if found == "torn":
                self.send_response(200)
                self.send_header("content-length", "1000")
                self.end_headers()
                self.wfile.write(b'{"data": [')
                self.close_connection = True
                return
            status, headers, content = found if isinstance(found, tuple) else (200, {}, found)
            raw = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"content-type": "application/json", "content-length": len(raw), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    service.address = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
