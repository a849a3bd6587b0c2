"""Serve local directories over the loopback interface as repositories of the Hugging Face hub.

The hub client reads HF_ENDPOINT when it is imported, so a test hands the address to a subprocess.
"""

import base64
import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

DEFAULT_REVISION = "main"
CREATED_AT = "2024-01-01T00:00:00.000Z"


def _blob_id(content: bytes) -> str:
    """Return the git object id of a file's content, by which the hub tags files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class _Repository:
    """One commit of one repository."""

    name: str
    files: dict[str, Path]
    blob_ids: dict[str, str]
    commit: str

    @classmethod
    def read(cls, name: str, directory: Path) -> "_Repository":
        """Take stock of a directory and name its state by a commit hash made of its contents."""
        files = {
            p.relative_to(directory).as_posix(): p
            for p in sorted(directory.rglob("*"))
            if p.is_file()
        }
        blob_ids = {path: _blob_id(file.read_bytes()) for path, file in files.items()}
        commit = hashlib.sha1(json.dumps([name, blob_ids]).encode()).hexdigest()
        return cls(name, files, blob_ids, commit)

    def has_revision(self, revision: str) -> bool:
        """Tell whether a revision names the only commit there is."""
        return revision in (DEFAULT_REVISION, self.commit)

    def describe(self) -> dict[str, object]:
        """Return what the hub says about a model."""
        return {
            "_id": self.commit[:24],
            "id": self.name,
            "modelId": self.name,
            "sha": self.commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "createdAt": CREATED_AT,
            "lastModified": CREATED_AT,
            "downloads": 0,
            "likes": 0,
            "tags": ["diffusers"],
            "library_name": "diffusers",
            "siblings": [{"rfilename": path} for path in self.files],
        }

    def list_tree(self, folder: str, recursive: bool) -> list[dict[str, object]]:
        """Return what the hub lists below a folder, the empty string being the root."""
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, object]] = {}
        for path, file in self.files.items():
            if not path.startswith(prefix):
                continue
            *parents, _ = path[len(prefix) :].split("/")
            shown_depth = len(parents) if recursive else min(len(parents), 1)
            for depth in range(shown_depth):
                parent = prefix + "/".join(parents[: depth + 1])
                tree_id = hashlib.sha1(parent.encode()).hexdigest()
                entries[parent] = {"type": "directory", "oid": tree_id, "size": 0, "path": parent}
            if recursive or not parents:
                size = file.stat().st_size
                entries[path] = {
                    "type": "file",
                    "oid": self.blob_ids[path],
                    "size": size,
                    "path": path,
                }
        return list(entries.values())


@dataclass(frozen=True)
class HubServer:
    """A running server: its address, its requests ("GET /path?query"), each repository's commit."""

    url: str
    commits: dict[str, str]
    requests: list[str] = field(default_factory=list)


class _HubError(Exception):
    """An answer by which the hub refuses a request."""

    def __init__(
        self, status: HTTPStatus, code: str, message: str, commit: str | None = None
    ) -> None:
        """Keep what the client tells refusals apart by."""
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit


class _HubHandler(BaseHTTPRequestHandler):
    """Answer the requests by which the hub client downloads a model."""

    protocol_version = "HTTP/1.1"

    def __init__(
        self,
        *connection: object,
        repositories: dict[str, _Repository],
        gated: Collection[str],
        cut: set[str],
        requests: list[str],
        uploads: Path | None,
    ) -> None:
        """Take repositories and requests before the base class answers the connection."""
        self.repositories = repositories
        self.gated = gated
        self.cut = cut
        self.requests = requests
        self.uploads = uploads
        super().__init__(*connection)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer with headers and content."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer with headers alone."""
        self._answer()

    def do_POST(self) -> None:
        """Take part in an upload: make a repository, say how files are sent, take a commit."""
        self.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name = "/".join(parts[2:4])
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            answer: object = self._create(name)
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["preupload"]:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": path, **modes} for path in paths]}
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["commit"]:
            answer = self._commit(name, [json.loads(line) for line in body.splitlines()])
        else:
            answer = {"errors": [], "warnings": []}  # of a model card
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _create(self, name: str) -> dict[str, str]:
        """Make an empty repository."""
        assert self.uploads is not None, "this server takes no uploads"
        directory = self.uploads / name
        directory.mkdir(parents=True, exist_ok=True)
        self.repositories[name] = _Repository.read(name, directory)
        return {"name": name, "url": f"http://{self.headers['Host']}/{name}"}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> dict[str, object]:
        """Write the files of a commit."""
        assert self.uploads is not None, "this server takes no uploads"
        for line in lines:
            if line["key"] == "file":
                path = self.uploads / name / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        self.repositories[name] = _Repository.read(name, self.uploads / name)
        commit = self.repositories[name].commit
        url = f"http://{self.headers['Host']}/{name}/commit/{commit}"
        return {"success": True, "commitOid": commit, "commitUrl": url}

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests free of access logs."""

    def _answer(self) -> None:
        """Record the request and send its answer or its refusal."""
        self.requests.append(f"{self.command} {self.path}")
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            # The API is asked for /api/models/<owner>/<name>/..., a file for
            # /<owner>/<name>/resolve/<revision>/...
            if parts[:2] == ["api", "models"] and len(parts) >= 4:
                self._answer_api(
                    self._find("/".join(parts[2:4])),
                    parts[4:],
                    "recursive=true" in url.query.lower(),
                )
            elif len(parts) >= 5 and parts[2] == "resolve":
                self._send_file(self._find("/".join(parts[:2])), parts[3], "/".join(parts[4:]))
            else:
                raise _HubError(
                    HTTPStatus.NOT_FOUND,
                    "NotFound",
                    "Sorry, we can't find the page you are looking for.",
                )
        except _HubError as error:
            body = json.dumps({"error": str(error)}).encode()
            self._send(error.status, body, {"Content-Type": "application/json"} | error.headers)

    def _find(self, name: str) -> _Repository:
        """Return a repository, or refuse as the hub does whether it is missing or private."""
        if name not in self.repositories:
            raise _HubError(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
        return self.repositories[name]

    def _require_revision(self, repository: _Repository, revision: str) -> None:
        """Refuse a revision that a repository does not have."""
        if not repository.has_revision(revision):
            raise _HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _answer_api(self, repository: _Repository, parts: list[str], recursive: bool) -> None:
        """Send the description or the file listing of a repository."""
        kind, revision, *folder = parts if len(parts) >= 2 else ("revision", DEFAULT_REVISION)
        self._require_revision(repository, revision)
        if kind == "revision":
            answer: object = repository.describe()
        elif kind == "tree":
            answer = repository.list_tree("/".join(folder), recursive)
        else:
            raise _HubError(HTTPStatus.NOT_FOUND, "NotFound", f"Unknown request: {kind}")
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repository: _Repository, revision: str, path: str) -> None:
        """Send a file of a repository with the headers from which the client fills its cache."""
        self._require_revision(repository, revision)
        if repository.name in self.gated:
            raise _HubError(
                HTTPStatus.FORBIDDEN,
                "GatedRepo",
                f"Access to model {repository.name} is restricted",
            )
        if path not in repository.files:
            raise _HubError(
                HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found", repository.commit
            )
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{repository.blob_ids[path]}"',
            "X-Repo-Commit": repository.commit,
        }
        content = repository.files[path].read_bytes()
        first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        if first != "0":
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(HTTPStatus.PARTIAL_CONTENT, content[int(first) :], headers)
        elif (
            path.endswith(".safetensors") and self.command == "GET" and repository.name in self.cut
        ):
            self.cut.discard(repository.name)
            self._send(HTTPStatus.OK, content, headers, sent=len(content) // 2)
        else:
            self._send(HTTPStatus.OK, content, headers)

    def _send(
        self,
        status: HTTPStatus,
        body: bytes,
        headers: dict[str, str],
        sent: int | None = None,
    ) -> None:
        """Send headers and, unless only they were asked for, a body.

        Arguments:
            sent: bytes after which the connection is cut; None sends all.
        """
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        # A kept connection would be answered by its thread even after the server was shut down.
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])


@contextmanager
def serve_hub(
    repositories: dict[str, Path],
    gated: Collection[str] = (),
    cut: Collection[str] = (),
    uploads: Path | None = None,
) -> Iterator[HubServer]:
    """Serve directories under the names of repositories ("owner/name") until the context ends.

    The files of `gated` repositories are described to everyone and given to no one. The connection
    is cut in the middle of one tensor file of each of the `cut` ones, once.
    Each repository has one commit, reached by its hash and by "main", fixed when the server starts
    or when it is pushed to; what is pushed lies below `uploads`.
    """
    served = {
        name: _Repository.read(name, Path(directory)) for name, directory in repositories.items()
    }
    requests: list[str] = []
    handler = partial(
        _HubHandler,
        repositories=served,
        gated=gated,
        cut=set(cut),
        requests=requests,
        uploads=uploads,
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        commits = {name: repository.commit for name, repository in served.items()}
        try:
            yield HubServer(f"http://127.0.0.1:{server.server_port}", commits, requests)
        finally:
            server.shutdown()
            thread.join()
