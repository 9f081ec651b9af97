"""A Weights & Biases server on loopback: as much of one as wandb-core asks, to see what a run has sent in the end."""

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from diffusion_trainer.callbacks.wandb_files import points_of

KEY = "0123456789" * 4


@dataclass
class Sent:
    """What one run has been sent: `lines` of its history by their offsets, of which a later one replaces an earlier."""

    lines: dict[int, str] = field(default_factory=dict)
    summary: str = "{}"
    config: str = "{}"
    said: dict = field(default_factory=dict)  # of itself: its group, its tags

    def rows(self) -> list[dict]:
        lines = dict(self.lines)  # more may come meanwhile
        assert sorted(lines) == list(range(len(lines))), "holes between what was sent"
        rows = [json.loads(lines[at]) for at in sorted(lines)]
        assert [row["_step"] for row in rows] == list(range(len(rows)))
        return rows

    def points(self) -> Counter:
        """(images seen, metric) -> how often."""
        return Counter(point for row in self.rows() for point in points_of(row))

    def take(self, post: dict) -> None:
        for name, chunk in post.get("files", {}).items():
            if name == "wandb-history.jsonl":
                self.lines |= {chunk["offset"] + i: line for i, line in enumerate(chunk["content"])}
            if name == "wandb-summary.json":
                self.summary = chunk["content"][-1]

    def told(self, query: str, variables: dict) -> dict:
        """What wandb.Api asks of a run."""
        if query == "RunHistoryKeys":
            return {"historyKeys": {"lastStep": len(self.lines) - 1}}
        if query == "RunParquetHistory":
            return {"parquetHistory": {"parquetUrls": [], "liveData": []}}
        if query == "HistoryPage":
            asked = range(variables["minStep"], variables["maxStep"])
            return {"history": [line for at, line in sorted(self.lines.items()) if at in asked]}
        return self.bucket(variables["name"]) | {"projectId": "1", "state": "finished", "systemMetrics": "{}"}

    def bucket(self, name: str) -> dict:
        """What a resumed run asks for."""
        tail = [self.lines[max(self.lines)]] if self.lines else []
        return {
            "id": "storage", "name": name, "displayName": name, "summaryMetrics": self.summary, "config": self.config,
            "historyLineCount": len(self.lines), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps(tail), "eventsTail": "[]", "tags": [], "notes": "", "wandbConfig": '{"t": 1}',
        }  # fmt: skip


@dataclass
class Server:
    """What comes while it does not answer waits, and is refused then."""

    url: str = ""
    runs: dict[str, Sent] = field(default_factory=dict)
    status: int | None = 200  # of all answers: with another, nothing is taken; None: there are none
    refused: str = ""  # the end of paths that are answered with 403
    forgets: bool = False  # what is in its rows, when it is asked
    turn: threading.Condition = field(default_factory=threading.Condition)

    @property
    def env(self) -> dict[str, str]:
        """For a run that talks to it, each second (the least; by default it is each 15)."""
        often = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1"}
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online", **often}

    def become(self, status: int | None) -> None:
        with self.turn:
            self.status = status
            self.turn.notify_all()

    def take(self, path: str, body: bytes) -> tuple[int, dict]:
        """Status and answer."""
        with self.turn:
            if self.status is None:
                self.turn.wait_for(lambda: self.status is not None)
                return 503, {}
            if self.refused and path.endswith(self.refused):
                return 403, {}
            return self.status, self.answer(path, body) if self.status == 200 else {}

    def answer(self, path: str, body: bytes) -> dict:
        if path.endswith("/graphql"):
            asked = json.loads(body)
            return {"data": self.query(asked["query"], asked.get("variables") or {})}
        if path.endswith("/file_stream"):
            self.runs[path.split("/")[-2]].take(json.loads(body))
        return {}

    def query(self, query: str, variables: dict) -> dict:
        person = {"id": "1", "name": "nobody", "entity": "nobody", "username": "nobody", "email": "", "flags": "{}",
                  "admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []}}  # fmt: skip
        if "UpsertBucket" in query or "upsertBucket" in query:
            name = variables.get("name") or variables.get("id")
            new = name not in self.runs
            run = self.runs.setdefault(name, Sent())
            run.config = variables.get("config") or run.config
            said = {name: variables.get(name) for name in ("groupName", "jobType", "tags", "notes")}
            run.said |= {name: value for name, value in said.items() if value}  # null: as it was
            project = {"id": "p", "name": variables.get("project") or "p", "entity": {"id": "e", "name": "nobody"}}
            bucket = run.bucket(name) | {"project": project, "sweepName": None, "commit": None}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "RunResumeStatus" in query:
            run = self.runs.get(variables["name"])
            bucket = run.bucket(variables["name"]) if run else None
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "nobody"}, "bucket": bucket}}
        if asked := re.search(r"query (RunParquetHistory|HistoryPage|RunHistoryKeys|Run)\b", query):
            run = self.runs[variables.get("name") or variables.get("runName") or variables["run"]]
            forgotten = self.forgets and asked[1] == "HistoryPage"
            return {"project": {"run": {"history": []} if forgotten else run.told(asked[1], variables)}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/put"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "storage", "uploadHeaders": [], "files": files}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}
        return {"viewer": person, "model": None, "project": None}


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = server.take(self.path, body)
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST

        def log_message(self, *_):
            return None

    class Web(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            return None  # a client that was killed

    web = Web(("127.0.0.1", 0), Answers)
    server.url = f"http://127.0.0.1:{web.server_port}"
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.become(200)
        web.shutdown()
        web.server_close()
