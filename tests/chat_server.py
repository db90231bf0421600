"""A real HTTP server on loopback that speaks as OpenAI-compatible ones do, and follows a script."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str | None, **usage: int) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    reply = {
        "id": "1",
        "created": 1,
        "model": "served",
        "object": "chat.completion",
        "system_fingerprint": "",
    }
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18, **usage}
    return json.dumps({**reply, "choices": [choice], "usage": usage}).encode()


class Server(ThreadingHTTPServer):
    """Answers each request with the next of its replies: (status, body, headers, seconds of waiting)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, bytes, dict[str, str], float]] = []
        self.requests: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []

    def say(
        self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, wait: float = 0.0
    ) -> None:
        self.replies.append((status, body, headers or {}, wait))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append(json.loads(body))
        self.server.tokens.append(self.headers.get("authorization"))
        status, reply, headers, wait = self.server.replies.pop(0)
        time.sleep(wait)
        if status == 0:  # cut off in the middle
            self.send_response(200)
            self.send_header("content-length", str(len(reply) * 2))
            self.end_headers()
            self.wfile.write(reply)
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"content-length": str(len(reply)), "content-type": "application/json"}.items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply)
