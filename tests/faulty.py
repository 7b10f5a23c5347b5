"""A server of scores in a thread that does what a script says: answers, fails, hangs or hangs up."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What an answer may be beside (status, body) and (status, body, headers).
HANG_UP, SLOW = "hang up", "slow"
SECONDS_SLOW = 0.4

Answer = Any


class Faulty:
    """Attributes: ``requests``, each as (path, headers, body); ``url``; ``busiest``: most of them at a time."""

    def __init__(self, answer: Callable[[dict, int], Answer]) -> None:
        self.requests: list[tuple[str, dict, dict]] = []
        self.busiest = self._busy = 0
        self.answer = answer
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    number = len(outer.requests) - 1
                    outer._busy += 1
                    outer.busiest = max(outer.busiest, outer._busy)
                try:
                    self._say(outer.answer(body, number))
                finally:
                    with outer._lock:
                        outer._busy -= 1

            def _say(self, answer: Answer) -> None:
                if answer == HANG_UP:
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # a reset, not an end
                    self.connection.close()
                    self.close_connection = True
                    return
                if answer == SLOW:
                    time.sleep(SECONDS_SLOW)
                    answer = (200, {"scores": []})
                status, said, headers = (*answer, {})[:3]
                out = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(out)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(out)

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with suppress(OSError, ValueError):  # the client went away, as it should from a slow server; or we did
                    super().handle()

            def finish(self) -> None:
                with suppress(OSError, ValueError):
                    super().finish()

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/score/evaluation"

    @property
    def texts(self) -> list[str]:
        """Of all requests, in order of their arrival."""
        return [text for _, _, body in self.requests for text in body["messages"]]


@contextmanager
def serving(answer: Callable[[dict, int], Answer] | list[Answer]) -> Iterator[Faulty]:
    """``answer(body, number of the request)``; or a list of answers, the last of which repeats."""
    script = answer if callable(answer) else lambda _, number: answer[min(number, len(answer) - 1)]
    faulty = Faulty(script)
    thread = threading.Thread(target=faulty.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        faulty.server.shutdown()
        faulty.server.server_close()
        thread.join()


def lengths(body: dict, _: int = 0) -> Answer:
    """The length of each text as its score."""
    return 200, {"scores": [float(len(text)) for text in body["messages"]]}


def judged(reply: Any) -> Answer:
    """What a chat judge answers."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": reply}}], "usage": {"total_tokens": 7}}
