"""A tiny OpenAI-compatible server on the loopback interface: it answers by simple rules, or fails as it is told to."""

import json
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PLAN = '{"questions": [{"t": 1.2, "text": "What is happening?", "keep_current": true, "cuts_in": false}]}'


def answer(prompt: str) -> str:
    """Plans one question, answers with the latest caption, revises it by the next."""
    captions = re.findall(r"^\s*\[[\d.]+ - [\d.]+\] (.*)$", prompt, re.MULTILINE)
    if "question(s)" in prompt:
        return PLAN
    if "Last answer" in prompt:
        return json.dumps({"action": "revise", "text": captions[-1]})
    return "```json\n" + json.dumps({"action": "answer", "text": captions[-1]}) + "\n```"


@dataclass
class ChatServer:
    """`faults` are used up one a request: a status code, or a text that is answered instead."""

    url: str = ""
    answer: Callable[[str], str] = answer
    faults: deque = field(default_factory=deque)
    prompts: list[str] = field(default_factory=list)  #: the last message of each request that was answered
    bodies: list[dict] = field(default_factory=list)
    keys: set = field(default_factory=set)
    running: int = 0
    most_running: int = 0
    gather: int = 1  #: the first requests wait for each other until so many are under way
    stall_after: int | None = None  #: answer so many requests, then none
    lock: threading.Lock = field(default_factory=threading.Lock)
    gathered: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve() -> Iterator[ChatServer]:
    server = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.keys.add(self.headers.get("Authorization"))
                fault = server.faults.popleft() if server.faults else None
                server.running += 1
                server.most_running = max(server.most_running, server.running)
                stalls = server.stall_after is not None and len(server.prompts) >= server.stall_after
                if server.running >= server.gather:
                    server.gathered.set()
            server.gathered.wait(20)
            try:
                if stalls:
                    server.released.wait(20)
                if isinstance(fault, int):
                    said = json.dumps({"error": f"no, {self.headers.get('Authorization')}"}).encode()
                    self.send_response(fault)
                    self.send_header("Retry-After", "0.01")
                else:
                    text = server.answer(body["messages"][1]["content"]) if fault is None else fault
                    with server.lock:
                        server.prompts.append(body["messages"][-1]["content"])
                        server.bodies.append(body)
                    message = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                    said = json.dumps(message | {"usage": {"prompt_tokens": 100, "completion_tokens": 10}}).encode()
                    self.send_response(200)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)
            except OSError:
                pass  # whoever asked was killed
            finally:
                with server.lock:
                    server.running -= 1

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        http.shutdown()
        http.server_close()
