"""The few HTTP calls of huggingface.co that huggingface_hub and llama.cpp make, answered on loopback.

Repositories are in memory. Only what these two ask for is there; anything else is a 404 and noted in `unknown`.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator

import pytest


class Repository:
    """Files by path, and the commit they are of."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.files: dict[str, bytes] = {}
        self.large: set[str] = set()  # files that went through LFS
        self.commits: list[dict] = []

    @property
    def sha(self) -> str:
        state = json.dumps([len(self.commits), sorted((k, oid(v)) for k, v in self.files.items())])
        return hashlib.sha1(state.encode()).hexdigest()


def oid(data: bytes) -> str:
    """The hash that LFS knows a file by."""
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    """The hash that git knows a file by."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """The server; `address` is what HF_ENDPOINT and MODEL_ENDPOINT are set to.

    `stored` are LFS objects by hash. `uploads` counts, for each, the transfers that were begun. `stall` holds
    transfers of objects larger than so many bytes back until `release` is set: to kill a client in mid-transfer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.downloads: list[str] = []
        self.sent = 0  # bytes of files
        self.ranges = True  # whether it answers with the part that was asked for, and not with the whole file
        self.unknown: list[str] = []
        self.authorized = False  # whether a request came with a token
        self.refuse: tuple[int, str] | None = None
        self.stall: int | None = None
        self.stalled, self.release = threading.Event(), threading.Event()
        self.address = ""

    def add(self, name: str, files: dict[str, bytes]) -> Repository:
        """A repository that is there already."""
        repository = self.repositories[name] = Repository(private=False)
        repository.files = dict(files)
        repository.large = {path for path in files if path.endswith(".gguf")}
        return repository


@contextlib.contextmanager
def serving() -> Iterator[FakeHub]:
    """A running server."""
    hub = FakeHub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def instead_of_the_hub(monkeypatch: pytest.MonkeyPatch, cache: pathlib.Path) -> Iterator[FakeHub]:
    """A running server that this process talks to instead of huggingface.co, with a cache of its own."""
    from huggingface_hub import constants

    with serving() as server:
        files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield server


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        self.hub.authorized |= "Authorization" in self.headers
        parts = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(parts.path), urllib.parse.parse_qs(parts.query)
        if self.hub.refuse and method != "GET":
            status, message = self.hub.refuse
            self._body()
            return self._json({"error": message}, status)
        for pattern, verbs, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in verbs:
                return getattr(self, name)(*match.groups(), query=query)
        self.hub.unknown.append(f"{method} {self.path}")
        self._body()
        return self._json({"error": "not found"}, 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        return found

    def create(self, *, query: dict) -> None:
        asked = json.loads(self._body())
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        if name in self.hub.repositories:
            return self._json(
                {"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}, 409
            )
        self.hub.repositories[name] = Repository(bool(asked.get("private")))
        return self._json({"url": f"{self.hub.address}/{name}", "name": name})

    def info(self, name: str, *rest: str, query: dict) -> None:
        if repository := self._repository(name):
            siblings = [{"rfilename": path, "size": len(repository.files[path])} for path in sorted(repository.files)]
            self._json({"id": name, "modelId": name, "sha": repository.sha, "private": repository.private,
                        "tags": [], "siblings": siblings})  # fmt: skip

    def validate(self, *, query: dict) -> None:
        self._body()
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str, *, query: dict) -> None:
        asked = json.loads(self._body())
        if repository := self._repository(name):
            files = []
            for file in asked["files"]:
                large = file["path"].endswith(".gguf") or file["size"] > 10_000_000
                old = repository.files.get(file["path"])
                known = None if old is None else oid(old) if large else git_oid(old)
                mode = "lfs" if large else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
            self._json({"files": files})

    def batch(self, name: str, *, query: dict) -> None:
        asked = json.loads(self._body())
        objects = []
        for one in asked["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.stored:
                answer["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}", "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def put(self, digest: str, *, query: dict) -> None:
        self.hub.uploads.append(digest)
        size = int(self.headers.get("Content-Length") or 0)
        if self.hub.stall is not None and size > self.hub.stall:
            self.rfile.read(size // 2)
            self.hub.stalled.set()
            self.hub.release.wait()
            self.close_connection = True
            return
        data = self._body()
        if oid(data) != digest:
            return self._json({"error": "content does not have the hash it was announced by"}, 400)
        self.hub.stored[digest] = data
        return self._json({})

    def commit(self, name: str, revision: str, *, query: dict) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        repository = self._repository(name)
        if repository is None:
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.stored[value["oid"]]
                repository.large.add(value["path"])
            else:
                return self._json({"error": f"a commit with {line['key']}"}, 400)
        repository.commits.append({**lines[0]["value"], "files": [line["value"]["path"] for line in lines[1:]]})
        url = f"{self.hub.address}/{name}/commit/{repository.sha}"
        self._json({"success": True, "commitOid": repository.sha, "commitUrl": url})

    def refs(self, name: str, *, query: dict) -> None:
        if repository := self._repository(name):
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.sha}
            self._json({"branches": [main], "tags": [], "converts": []})

    def tree(self, name: str, revision: str, *, query: dict) -> None:
        if repository := self._repository(name):
            listed = []
            for path, data in sorted(repository.files.items()):
                entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
                if path in repository.large:
                    entry["lfs"] = {"oid": oid(data), "size": len(data), "pointerSize": 134}
                listed.append(entry)
            self._json(listed)

    def resolve(self, name: str, revision: str, path: str, *, query: dict) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        data = repository.files.get(path)
        if data is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        tag = oid(data) if path in repository.large else git_oid(data)
        start, size = 0, len(data)
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.hub.ranges else None
        if given:
            start = int(given[1])
            data = data[: int(given[2]) + 1] if given[2] else data
        self.send_response(206 if given else 200)
        if given:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{size}")
        for key, value in {"ETag": f'"{tag}"', "X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes",
                           "Content-Length": str(len(data) - start)}.items():  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.hub.downloads.append(path)
            with contextlib.suppress(ConnectionError):  # who has enough does not read on
                for first in range(start, len(data), PIECE):
                    self.hub.sent += self.wfile.write(data[first : first + PIECE])


PIECE = 1 << 16  # bytes that are sent at once
_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"/api/repos/create", ("POST",), "create"),
    (r"/api/validate-yaml", ("POST",), "validate"),
    (rf"/api/models/{_NAME}/preupload/([^/]+)", ("POST",), "preupload"),
    (rf"/api/models/{_NAME}/commit/([^/]+)", ("POST",), "commit"),
    (rf"/api/models/{_NAME}/refs", ("GET",), "refs"),
    (rf"/api/models/{_NAME}/tree/([^/]+)", ("GET",), "tree"),
    (rf"/api/(?:models|datasets)/{_NAME}", ("GET",), "info"),
    (rf"/api/(?:models|datasets)/{_NAME}/revision/([^/]+)", ("GET",), "info"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", ("POST",), "batch"),
    (r"/lfs/(\w+)", ("PUT",), "put"),
    (rf"(?:/datasets)?/{_NAME}/resolve/([^/]+)/(.+)", ("GET", "HEAD"), "resolve"),
]
