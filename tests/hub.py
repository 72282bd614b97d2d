"""A stand-in for the Hugging Face hub that speaks as much of its HTTP as a push needs, with repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_stand_in"


@dataclass
class Repo:
    """A repository: its files, whether it is private, and the messages of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What was sent to it, and where it listens."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    asked: list[str] = field(default_factory=list)
    failing: str | None = None  # requests whose path has this in it are refused


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """An HTTP server on a free port of this machine, until the context ends; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub on a free port, until the context ends."""
    found = Hub()
    with serving(type("Handler", (_Handler,), {"hub": found})) as found.url:
        yield found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _refused(self) -> bool:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.hub.failing is not None and self.hub.failing in self.path:
            self._answer({"error": "out of order"}, 400)
            return True
        if not self.path.startswith("/large/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials"}, 401)
            return True
        return False

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path.startswith("/api/whoami-v2"):
            self._answer({"type": "user", "name": "ada", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
            return
        name, rest = self._model()
        repo = self.hub.repos.get(name)
        if repo is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif rest.startswith("/tree"):
            self._answer(
                [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in repo.files.items()]
            )
        else:
            siblings = [{"rfilename": path} for path in repo.files]
            self._answer(
                {
                    "id": name,
                    "modelId": name,
                    "private": repo.private,
                    "sha": "0" * 40,
                    "siblings": siblings,
                    "tags": [],
                }
            )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"ada/{asked['name']}"
            if name in self.hub.repos:
                self._answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
                return
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repos[name] = Repo(bool(private), {".gitattributes": b""})
            self._answer({"url": f"{self.hub.url}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        else:
            self._of_model(body)

    def _of_model(self, body: bytes) -> None:
        name, rest = self._model()
        if rest.startswith("/preupload"):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
            return
        assert rest.startswith("/commit"), self.path
        repo = self.hub.repos[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    repo.commits.append(value["summary"])
                case "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repo.files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del repo.files[value["path"]]
        url = f"{self.hub.url}/{name}/commit/{'1' * 40}"
        self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        oid = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.large[oid] = data
        self._answer({})

    def _model(self) -> tuple[str, str]:
        found = re.match(r"/api/models/([^/]+/[^/?]+)([^?]*)", self.path)
        assert found is not None, self.path
        return found[1], found[2]
