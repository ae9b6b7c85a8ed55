"""As much of W&B's GraphQL API as a dashboard asks for, on this machine; and a driver of the real command.

``python dashboard_server.py '[["project=p"], ...]'`` runs the command once a list of words in one process and prints
what became of each.
"""

import contextlib
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RUNS = [
    {"seed": {"value": 0}, "task": {"value": "train"}, "scheduler": {"value": {"_target_": "a.Cosine", "s": 0.008}}},
    {"seed": {"value": 1}, "task": {"value": "train"}, "scheduler": {"value": {"_target_": "a.Flow"}}},
]


class Handler(BaseHTTPRequestHandler):
    """Answers queries for the project ``here``; ``missing`` there is not, reports of ``broken`` are refused, and once
    ``closed`` was asked for nobody is let in.
    """

    asked: list[dict[str, Any]]

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:
        """One query."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path != "/graphql":  # W&B's telemetry
            return self._answer(200, {})
        self.asked.append(asked := json.loads(body))
        if any((each.get("variables") or {}).get("project") == "closed" for each in self.asked):
            return self._answer(401, {"errors": [{"message": "invalid api key"}]})
        status, data = self._data(asked["query"], asked.get("variables") or {})
        self._answer(status, data)

    def _data(self, query: str, variables: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "viewer {" in query:
            me = {"id": "u", "entity": "me", "username": "me", "email": "e", "flags": "{}", "teams": {"edges": []}}
            return 200, {"data": {"viewer": me}}
        if "upsertView" in query and variables["projectName"] == "broken" and variables["type"] == "runs":
            return 404, {"errors": [{"message": "no such thing"}]}
        if "upsertView" in query:
            view = {"id": f"id-{variables['type']}", "name": variables["name"]}
            return 200, {"data": {"upsertView": {"view": view, "inserted": True}}}
        if variables.get("project") == "missing":
            return 200, {"data": {"project": None}}
        edges = [{"node": _run(place, config), "cursor": str(place)} for place, config in enumerate(RUNS)]
        runs = {"edges": edges, "pageInfo": {"endCursor": "1", "hasNextPage": False}}
        return 200, {"data": {"project": {"internalId": "x", "runCount": 2, "readOnly": False, "runs": runs}}}

    def _answer(self, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _run(place: int, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **dict.fromkeys(("sweepName", "group", "jobType", "commit", "description", "notes"), None),
        **{"id": f"gid{place}", "name": f"run{place}", "displayName": f"run {place}", "tags": [], "state": "finished"},
        **{"createdAt": "2026-11-21T10:00:00Z", "heartbeatAt": "2026-11-21T10:00:00Z", "historyLineCount": 3},
        **{"config": json.dumps(config), "summaryMetrics": json.dumps({"val/fid_64": 3.0, "train/loss": 1.0})},
        **{"systemMetrics": "{}", "historyKeys": {}, "projectId": "1", "readOnly": False},
        "user": {"name": "me", "username": "me"},
    }


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The server's address, and what it is asked for, while it runs."""
    handler = type("Asked", (Handler,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """Runs the command again and again."""
    from ornstein.cli import dashboard

    told = []
    for words in json.loads(sys.argv[1]):
        sys.argv = ["dashboard", *words]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                dashboard.main()
            except SystemExit as stop:
                code = int(str(stop.code))
        told.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(told))


if __name__ == "__main__":
    main()
