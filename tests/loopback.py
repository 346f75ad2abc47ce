"""A chat endpoint on this machine: the OpenAI protocol over real HTTP, with faults on demand.

    with Loopback(answer=lambda body: "hello", faults={0: "429"}) as end:
        OpenAI(base_url=end.base_url, api_key="none")

It counts what it was asked and what it would bill, so a client's own books can be checked.
"""

import json
import random
import re
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = (
    "429 500 503 400 401 quota slow hang cut malformed empty null truncated refused "
    "model usage nousage surrogate deep"
).split()
STATUS = {"429": 429, "500": 500, "503": 503, "400": 400, "401": 401, "quota": 429}


def count_words(text: str) -> int:
    """Tokens as this endpoint counts them: words."""
    return len(text.split())


def echo(body: dict) -> str:
    """The default answer: the last message, back."""
    return "You said: " + body["messages"][-1]["content"]


def some_faults(rate: float, names=("429", "500", "cut", "malformed", "empty"), seed: int = 0):
    """A fault rule: each arriving call is hit with probability `rate`, drawn from a seed."""
    rng = random.Random(seed)
    return lambda n, body: rng.choice(names) if rng.random() < rate else None


class Loopback:
    """A counting endpoint; `faults` maps call number -> fault name, or is a rule(n, body)."""

    def __init__(self, answer=echo, faults=None, latency=0.0, retry_after="0.05", slow=0.5):
        self.answer, self.latency, self.slow = answer, latency, slow
        # seconds as text, or headers: {name: function that makes the value}
        self.waits = {"Retry-After": lambda: retry_after} if retry_after else {}
        self.waits = retry_after if isinstance(retry_after, dict) else self.waits
        self.faults = faults if callable(faults) else lambda n, body: (faults or {}).get(n)
        self.calls = []  # every call that arrived: {n, body, fault, headers, sent, usage}
        self.flying = self.widest = 0
        self.lock, self.closing = threading.Lock(), threading.Event()

    def __enter__(self):
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args):
                pass

            def do_POST(self):
                loopback.serve(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                pass  # a killed client breaks its pipe: that is what the tests are for

        self.server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def serve(self, http):
        """Answer one call, or spoil it."""
        body = json.loads(http.rfile.read(int(http.headers["Content-Length"])))
        with self.lock:
            call = {"n": len(self.calls), "body": body, "headers": dict(http.headers)}
            call |= {"sent": False, "usage": None, "at": time.monotonic()}
            call["fault"] = fault = self.faults(call["n"], body)
            if fault is not None and fault not in FAULTS:
                raise ValueError(f"expected a fault of {FAULTS}, got {fault!r}")
            self.calls.append(call)
            self.flying += 1
            self.widest = max(self.widest, self.flying)
        try:
            self.closing.wait(self.latency + (self.slow if fault == "slow" else 0))
            if fault == "hang":
                self.closing.wait(600)
                http.close_connection = True
            elif fault in STATUS:
                code = "insufficient_quota" if fault == "quota" else f"fault_{fault}"
                error = {"error": {"message": f"a fault: {fault}", "code": code}}
                self.send(http, json.dumps(error), STATUS[fault])
            else:
                self.reply(http, call, body, fault)
        except OSError:
            http.close_connection = True
        finally:
            with self.lock:
                self.flying -= 1

    def reply(self, http, call, body, fault):
        """A completion, with the fault worked into it."""
        text, finish, refusal = self.answer(body), "stop", None
        if fault == "empty":
            text = ""
        if fault == "null":
            text = None
        if fault == "surrogate":
            text += " \ud83d"
        if fault == "truncated":
            text, finish = " ".join(text.split()[: body.get("max_tokens", 9) // 2]), "length"
        if fault == "refused":
            text, refusal = None, "I cannot help with that."
        spoken = text or refusal or ""
        words_in = sum(count_words(m["content"]) for m in body["messages"])
        usage = {"prompt_tokens": words_in, "completion_tokens": count_words(spoken)}
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        call["usage"] = dict(usage)
        if fault == "usage":
            usage["total_tokens"] += 7
        message = {"role": "assistant", "content": text, "refusal": refusal}
        data = {
            "id": f"chatcmpl-{call['n']}",
            "object": "chat.completion",
            "created": 0,
            "model": "another-model" if fault == "model" else body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": usage,
        }
        if fault == "nousage":
            del data["usage"]
        page = json.dumps(data)
        if fault == "malformed":
            page = page[: len(page) // 2]
        if fault == "deep":
            page = page[:-1] + ', "more": ' + "[" * 10**5 + "]" * 10**5 + "}"
        self.send(http, page, 200, cut=fault == "cut")
        call["sent"] = True

    def send(self, http, page: str, status: int, cut: bool = False):
        """Write the response; a cut one breaks off in the middle of its body."""
        data = page.encode()
        http.send_response(status)
        http.send_header("Content-Type", "application/json")
        http.send_header("Content-Length", str(len(data)))
        if status in (429, 503):
            for name, value in self.waits.items():
                http.send_header(name, value())
        http.end_headers()
        http.wfile.write(data[: len(data) // 2] if cut else data)
        http.wfile.flush()
        if cut:
            http.close_connection = True
            http.connection.shutdown(socket.SHUT_RDWR)

    def bodies(self) -> Counter:
        """How often each distinct request arrived."""
        return Counter(json.dumps(c["body"], sort_keys=True) for c in self.calls)

    def billed(self, calls=None) -> tuple:
        """(tokens in, tokens out) of the calls that were sent whole with true counts."""
        spoiled = ("cut", "malformed", "deep", "model", "usage", "nousage")
        calls = [c for c in calls or self.calls if c["sent"] and c["fault"] not in spoiled]
        used = [c["usage"] for c in calls]
        return sum(u["prompt_tokens"] for u in used), sum(u["completion_tokens"] for u in used)


def divide(body: dict) -> str:
    """The answer of a teacher that cuts every path into threes, in the format it was asked for."""
    lines = body["messages"][-1]["content"].split("Actions:\n")[-1].splitlines()
    actions = [line.split(". ", 1)[1] for line in lines]
    answer = []
    for n, first in enumerate(range(0, len(actions), 3), 1):
        part = actions[first : first + 3]
        name = "do(" + re.sub(r"[^\w ]", "", part[-1]) + ")"
        listed = ", ".join(f"'{action}'" for action in part)
        spans = f"{n}. {name}: {first + 1}-{first + len(part)}"
        verbatim = f"{n}- {name}: {{{listed}}}"
        answer.append(verbatim if "in braces" in body["messages"][0]["content"] else spans)
    return "\n".join(answer)
