"""A small hub on the loopback interface: what huggingface_hub and datasets ask of the real one.

Routes, headers and error codes are those of huggingface.co as the sources of huggingface_hub read
them: git and LFS files, commits and refs, gated and private repositories, uploads.
"""

from __future__ import annotations

import atexit
import base64
import functools
import hashlib
import json
import os
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.warm import LIBRARIES, warm_process

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from tests.warm import Warm

# The token of a user who may read what is private, and has been let into what is gated.
MEMBER = "hf_member"
# The token of a user who may do neither.
STRANGER = "hf_stranger"
# What the hub keeps in LFS, by .gitattributes.
_LARGE = (".safetensors", ".onnx", ".parquet", ".bin")


@dataclass
class Repository:
    """One repository: its files at each commit, and the commit that each branch or tag names."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add or replace files on a branch; return the id of the commit."""
        parent = self.refs.get(branch, "")
        content = {**self.commits.get(parent, {}), **files}
        digests = {path: hashlib.sha256(data).hexdigest() for path, data in content.items()}
        sha = hashlib.sha1(json.dumps([parent, digests]).encode()).hexdigest()  # noqa: S324
        self.commits[sha] = dict(sorted(content.items()))
        self.refs[branch] = sha
        return sha


class Hub:
    """Repositories by kind (``models``, ``datasets``) and name, and the requests that came."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.created: list[tuple[str, bool]] = []  # names, and whether they are private
        self.down = False
        self.full = False
        self.address = ""
        self.routes = self._routes()

    def repository(
        self, kind: str, name: str, *, private: bool = False, gated: bool = False
    ) -> Repository:
        """Return a repository; make it if it is not there."""
        made = Repository(private=private, gated=gated)
        return self.repositories.setdefault((kind, name), made)

    def _routes(self) -> Starlette:
        name = "{owner}/{name}"
        api = "/api/{kind}/" + name
        return Starlette(
            routes=[
                Route("/", self.home),
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", self.validate, methods=["POST"]),
                Route(api, self.info),
                Route(f"{api}/revision/{{revision}}", self.info),
                Route(f"{api}/tree/{{revision}}", self.tree),
                Route(f"{api}/tree/{{revision}}/{{path:path}}", self.tree),
                Route(f"{api}/paths-info/{{revision}}", self.paths, methods=["POST"]),
                Route(f"{api}/preupload/{{revision}}", self.preupload, methods=["POST"]),
                Route(f"{api}/commit/{{revision}}", self.commit, methods=["POST"]),
                Route(f"/{name}.git/info/lfs/objects/batch", self.batch, methods=["POST"]),
                Route("/lfs/{oid}", self.object, methods=["GET", "PUT"]),
                Route("/lfs/{oid}/verify", self.verify, methods=["POST"]),
                Route(f"/{{kind}}/{name}/resolve/{{revision}}/{{path:path}}", self.resolve),
                Route(f"/{name}/resolve/{{revision}}/{{path:path}}", self.resolve),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; a slash inside a revision, ``%2F``, does not end it."""
        raw_path = scope["raw_path"].decode().replace("%2F", "%252F")
        await self.routes({**scope, "path": unquote(raw_path)}, receive, send)

    async def home(self, _request: Request) -> Response:
        return Response("a hub", 503 if self.down else 200)

    def find(self, request: Request, *, content: bool = False) -> tuple[Repository, str] | Response:
        """Return repository and commit of a request, or the answer that refuses it.

        ``content`` asks for files, which a gated repository keeps; its page is open to all.
        """
        self.requests.append(f"{request.method} {request.url.path}")
        if self.down:
            return Response("Service Unavailable", 503)
        user = request.headers.get("authorization", "").removeprefix("Bearer ")
        if user and user not in (MEMBER, STRANGER):
            # Without an error code: huggingface_hub tells this case by the message.
            message = "Invalid credentials in Authorization header"
            return refusal(401, None, message)
        parameters = request.path_params
        kind = parameters.get("kind", "models")
        name = f"{parameters['owner']}/{parameters['name']}"
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and user != MEMBER):
            # Whoever is not logged in may not know whether there is such a repository.
            return refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repository.gated and user != MEMBER:
            message = f"Access to {name} is restricted and you are not in the authorized list."
            return refusal(403 if user else 401, "GatedRepo", message)
        revision = unquote(parameters.get("revision", "main"))
        sha = revision if revision in repository.commits else repository.refs.get(revision)
        if sha is None:
            return refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, sha

    async def info(self, request: Request) -> Response:
        found = self.find(request)
        if isinstance(found, Response):
            return found
        repository, sha = found
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        return JSONResponse(
            {
                "_id": sha[:24],
                "id": name,
                "modelId": name,
                "sha": sha,
                "lastModified": "2024-01-30T07:41:18.000Z",
                "createdAt": "2022-03-02T23:29:22.000Z",
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": path} for path in repository.commits[sha]],
            }
        )

    async def tree(self, request: Request) -> Response:
        found = self.find(request)
        if isinstance(found, Response):
            return found
        repository, sha = found
        folder = request.path_params.get("path", "").rstrip("/")
        prefix = f"{folder}/" if folder else ""
        inside = {p: d for p, d in repository.commits[sha].items() if p.startswith(prefix)}
        if folder and not inside:
            return refusal(404, "EntryNotFound", f"{folder} does not exist on '{sha}'")
        recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
        entries: dict[str, dict[str, Any]] = {}
        for path, data in inside.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                directory = prefix + "/".join(parts[:depth])
                entries[directory] = {
                    "type": "directory",
                    "oid": hashlib.sha1(directory.encode()).hexdigest(),  # noqa: S324
                    "size": 0,
                    "path": directory,
                }
            if recursive or len(parts) == 1:
                entries[path] = entry(path, data)
        return JSONResponse(list(entries.values()))

    async def paths(self, request: Request) -> Response:
        found = self.find(request)
        if isinstance(found, Response):
            return found
        repository, sha = found
        files = repository.commits[sha]
        if "json" in request.headers["content-type"]:
            asked = (await request.json())["paths"]
        else:
            asked = (await request.form()).getlist("paths")
        entries = [entry(path, files[path]) for path in asked if path in files]
        entries += [
            {
                "type": "directory",
                "oid": hashlib.sha1(path.encode()).hexdigest(),  # noqa: S324
                "size": 0,
                "path": path,
            }
            for path in asked
            if any(each.startswith(f"{path}/") for each in files)
        ]
        return JSONResponse(entries)

    async def resolve(self, request: Request) -> Response:
        found = self.find(request, content=True)
        if isinstance(found, Response):
            return found
        repository, sha = found
        path = request.path_params["path"]
        data = repository.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if data is None:
            answer = refusal(404, "EntryNotFound", "Entry not found")
            answer.headers.update(headers)
            return answer
        facts = entry(path, data)
        if "lfs" in facts:
            oid = facts["lfs"]["oid"]
            self.objects[oid] = data
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            # Another host, as at the real hub: clients take the headers above for the file's own.
            elsewhere = self.address.replace("127.0.0.1", "localhost")
            return RedirectResponse(f"{elsewhere}/lfs/{oid}", 302, headers)
        headers |= {"ETag": f'"{facts["oid"]}"'}
        return Response(data, headers=headers, media_type="text/plain")

    async def object(self, request: Request) -> Response:
        oid = request.path_params["oid"]
        self.requests.append(f"{request.method} /lfs")
        if request.method == "PUT":
            if self.full:
                return Response("Quota exceeded", 403)
            data = await request.body()
            if hashlib.sha256(data).hexdigest() != oid:
                return Response("BadDigest", 400)
            self.objects[oid] = data
            return Response()
        data = self.objects[oid]
        first = request.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first[0] or 0), int(first[2] or len(data) - 1)
        status = 206 if "range" in request.headers else 200
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return Response(data[start : end + 1], status, headers)

    async def create(self, request: Request) -> Response:
        user = request.headers.get("authorization", "").removeprefix("Bearer ")
        self.requests.append("POST /api/repos/create")
        if user not in (MEMBER, STRANGER):
            return refusal(401, None, "Invalid credentials in Authorization header")
        wanted = await request.json()
        # Version 1 of the client gives the visibility in place of a truth value.
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        name = f"{wanted['organization']}/{wanted['name']}"
        if user == STRANGER:
            message = f'You don\'t have the rights to create a model under the namespace "{name}"'
            return refusal(403, None, message)
        self.created.append((name, private))
        kind = f"{wanted.get('type', 'model')}s"
        body = {"url": f"{self.address}/{name}", "name": name, "id": name}
        if (kind, name) in self.repositories:
            return JSONResponse(
                body | {"error": "You already created this model repo"}, status_code=409
            )
        self.repository(kind, name, private=private).commit(
            {".gitattributes": b"*.onnx filter=lfs diff=lfs merge=lfs -text\n"}
        )
        return JSONResponse(body)

    async def validate(self, _request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request: Request) -> Response:
        found = self.find(request)
        if isinstance(found, Response):
            return found
        repository, sha = found
        files = (await request.json())["files"]
        present = repository.commits[sha]
        return JSONResponse(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": entry(file["path"], present[file["path"]])["oid"]
                        if file["path"] in present
                        else None,
                    }
                    for file in files
                ],
                "commitOid": sha,
            }
        )

    async def batch(self, request: Request) -> Response:
        found = self.find(request)
        if isinstance(found, Response):
            return found
        asked = await request.json()
        assert asked["operation"] == "upload"
        objects = []
        for each in asked["objects"]:
            address = f"{self.address}/lfs/{each['oid']}"
            actions = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            known = each["oid"] in self.objects
            objects.append(
                {**each, "authenticated": True} | ({} if known else {"actions": actions})
            )
        answer = {"transfer": "basic", "objects": objects}
        return JSONResponse(answer, media_type="application/vnd.git-lfs+json")

    async def verify(self, request: Request) -> Response:
        asked = await request.json()
        data = self.objects.get(asked["oid"], b"")
        return Response(status_code=200 if len(data) == asked["size"] else 404)

    async def commit(self, request: Request) -> Response:
        found = self.find(request)
        if isinstance(found, Response):
            return found
        repository, _ = found
        files: dict[str, bytes] = {}
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        sha = repository.commit(files, request.path_params["revision"])
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        return JSONResponse(
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.address}/{name}/commit/{sha}",
                "hookOutput": "",
            }
        )


def refusal(status: int, code: str | None, message: str) -> Response:
    """Return an error as the hub gives it: the code and the message are headers."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return JSONResponse({"error": message}, status, headers)


def entry(path: str, data: bytes) -> dict[str, Any]:
    """Return what the hub says of a file; its oid is that of git."""

    def git_oid(content: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324

    facts: dict[str, Any] = {"type": "file", "size": len(data), "path": path}
    if not path.endswith(_LARGE):
        return facts | {"oid": git_oid(data)}
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
    lfs = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
    return facts | {"oid": git_oid(pointer.encode()), "lfs": lfs}


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Serve an empty hub on a free port."""
    hub = Hub()
    config = uvicorn.Config(hub, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    hub.address = f"http://127.0.0.1:{port}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(timeout=10)


def environment(endpoint: str, home: Path, **changes: str) -> dict[str, str]:
    """Return the environment of a user of this hub: a cache of its own, and no other network.

    Whatever is asked of another machine goes to a proxy that is not there.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith(("HF_", "HUGGINGFACE_"))
    }
    nowhere = "http://127.0.0.1:9"
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",  # this hub speaks Git LFS alone
        "HTTP_PROXY": nowhere,
        "HTTPS_PROXY": nowhere,
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def ad2kit(
    *arguments: str | Path, env: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command as its user does: the hub's libraries read the environment on import."""
    return _libraries().run(*arguments, environment=env, cwd=cwd)


@functools.cache
def _libraries() -> Warm:
    """The process that has imported everything but the hub's libraries."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(warm_process(LIBRARIES))
