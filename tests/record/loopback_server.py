"""A server on this machine that speaks as much of W&B's protocol as the unmodified client and the public API need.

It keeps what it is sent (runs, history rows, files, artifacts, reports), so that a test can ask what arrived, and
misbehaves on demand: :attr:`LoopbackServer.faults`.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "team"
TIME = "2026-01-01T00:00:00Z"
HANG_S = 120
"""Longer than any time that the client is given."""


@dataclass
class StoredRun:
    """What the server has of one run."""

    name: str
    project: str
    fields: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    n_opened: int = 0

    @property
    def steps(self) -> list[int]:
        """``_step`` of every row, in the order in which they arrived."""
        return [row["_step"] for row in self.history]


@dataclass
class StoredArtifact:
    """One artifact version, committed or not."""

    id: str
    name: str
    run: str
    state: str = "PENDING"
    manifest: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)


class LoopbackServer:
    """The state of a server; see the module.

    Attributes:
        url: Where it listens.
        runs: Runs by their ids.
        artifacts: All artifacts, oldest first.
        reports: Saved reports by their ids.
        faults: By kind of request (``graphql``, ``file_stream``, ``put``): ``"hang"``, or an HTTP status.
        answers_before_fault: By kind, how many requests are answered before the fault begins.
        n_requests: Requests of each kind so far, a GraphQL operation under its own name too.
        keys: What clients authenticated with.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: list[StoredArtifact] = []
        self.reports: dict[str, dict[str, Any]] = {}
        self.faults: dict[str, str | int] = {}
        self.answers_before_fault: dict[str, int] = {}
        self.n_requests: dict[str, int] = {}
        self.unknown: list[str] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.url = ""

    def fault(self, kind: str) -> str | int | None:
        """Counts a request; what is to go wrong with it."""
        with self.lock:
            self.n_requests[kind] = self.n_requests.get(kind, 0) + 1
            if self.answers_before_fault.get(kind, 0) > 0:
                self.answers_before_fault[kind] -= 1
                return None
            return self.faults.get(kind)

    # -- GraphQL -------------------------------------------------------------------------------------------------------

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The ``data`` of one GraphQL request."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found.group(1) if found else ""
        with self.lock:
            self.n_requests[name] = self.n_requests.get(name, 0) + 1
            operation: Callable[[dict[str, Any]], dict[str, Any]] | None = getattr(self, f"_{_snake(name)}", None)
            if operation is None:
                self.unknown.append(name)
                return {}
            return operation(variables)

    def _viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        user = {"id": "VXNlcjox", "entity": ENTITY, "username": "tester", "name": "tester", "email": "t@t.invalid"}
        return {"viewer": {**user, "flags": "{}", "admin": False, "deletedAt": None, "teams": teams}}

    def _get_default_entity(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self._viewer(variables)

    def _server_features_query(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _organization_core_weave_organization_i_d(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"organization": None, "entity": None}

    def _run_resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        model = {"id": "UHJvamVjdDox", "name": variables["project"], "entity": {"id": "RW50aXR5OjE=", "name": ENTITY}}
        if run is None:
            return {"model": {**model, "bucket": None}}
        tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
        bucket = {
            "id": run.fields["id"],
            "name": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.fields["displayName"],
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "config": json.dumps(run.fields.get("config") or {}),
            "tags": run.fields.get("tags") or [],
            # Without a start time the run counts as one that never began.
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {**model, "bucket": bucket}}

    def _upsert_bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        is_new = name not in self.runs
        project = variables.get("project") or "uncategorized"
        run = self.runs.setdefault(name, StoredRun(name, project))
        run.n_opened += 1
        run.exit_code = None
        run.fields.setdefault("id", base64.b64encode(f"Run:v1:{name}:{project}:{ENTITY}".encode()).decode())
        for key in ("displayName", "groupName", "jobType", "tags"):
            if variables.get(key) is not None:
                run.fields[key] = variables[key]
        run.fields.setdefault("displayName", name)
        if variables.get("config"):
            run.fields["config"] = json.loads(variables["config"])
        bucket = {
            "id": run.fields["id"],
            "name": name,
            "displayName": run.fields["displayName"],
            "description": "",
            "config": json.dumps(run.fields.get("config") or {}),
            "sweepName": None,
            "historyLineCount": len(run.history),
            "project": {"id": "UHJvamVjdDox", "name": project, "entity": {"id": "RW50aXR5OjE=", "name": ENTITY}},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _create_run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/put/run/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    # -- artifacts -----------------------------------------------------------------------------------------------------

    def _artifact_type(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables.get("input", variables)
        name = given.get("artifactCollectionName") or given.get("artifactCollectionNames", ["?"])[0]
        made = StoredArtifact(f"artifact-{len(self.artifacts)}", name, given.get("runName") or "")
        self.artifacts.append(made)
        sequence = {"id": f"sequence-{name}", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": made.id, "state": "PENDING", "artifactSequence": sequence}}}

    def _create_artifact_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = variables.get("input", variables)["artifactID"]
        url = f"{self.url}/put/manifest/{artifact}/wandb_manifest.json"
        file = {
            "id": "f",
            "name": "wandb_manifest.json",
            "displayName": "wandb_manifest.json",
            "uploadUrl": url,
            "uploadHeaders": [],
        }
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{artifact}", "file": file}}}

    def _create_artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for number, file in enumerate(variables["input"]["artifactFiles"]):
            artifact, name = file["artifactID"], file["name"]
            node = {
                "id": f"file-{number}",
                "name": name,
                "displayName": name,
                "storagePath": f"{artifact}/{name}",
                "uploadUrl": f"{self.url}/put/artifact/{artifact}/{name}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": artifact},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables.get("input", variables)["artifactID"]
        for artifact in self.artifacts:
            if artifact.id == wanted:
                artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": wanted, "digest": "d"}}}

    # -- the public API ------------------------------------------------------------------------------------------------

    def _run(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"project": {"run": None}}
        state = "running" if run.exit_code is None else "finished" if run.exit_code == 0 else "failed"
        found = {
            "projectId": "1",
            "id": run.fields["id"],
            "name": run.name,
            "displayName": run.fields["displayName"],
            "tags": run.fields.get("tags") or [],
            "sweepName": None,
            "state": state,
            "config": json.dumps(run.fields.get("config") or {}),
            "group": run.fields.get("groupName"),
            "jobType": run.fields.get("jobType"),
            "commit": None,
            "readOnly": False,
            "createdAt": TIME,
            "heartbeatAt": TIME,
            "description": "",
            "notes": "",
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "user": {"name": "tester", "username": "tester"},
            "historyKeys": {"lastStep": run.steps[-1] if run.history else -1, "keys": {}},
        }
        return {"project": {"run": found}}

    def _run_history_keys(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self._run(variables)

    def _run_parquet_history(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[variables["runName"]]
        wanted = set(variables["liveKeys"]) | {"_step"}
        live = [{key: value for key, value in row.items() if key in wanted} for row in run.history]
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": live}}}}

    def _history_page(self, variables: dict[str, Any]) -> dict[str, Any]:
        low, high = variables["minStep"], variables["maxStep"]
        rows = [row for row in self.runs[variables["run"]].history if low <= row["_step"] < high]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows[: variables["pageSize"]]]}}}

    def _run_output_artifacts(self, variables: dict[str, Any]) -> dict[str, Any]:
        # The public API cannot read those that are not closed, so they are taken not to be listed.
        committed = [artifact for artifact in self.artifacts if artifact.state == "COMMITTED"]
        own = [artifact for artifact in committed if artifact.run == variables["run"]]
        project: dict[str, Any] = {"id": "UHJvamVjdDox", "internalId": "UHJvamVjdDox", "name": variables["project"]}
        project["entity"] = {"id": "RW50aXR5OjE=", "name": ENTITY}
        edges = []
        for number, artifact in enumerate(own):
            sequence = {"__typename": "ArtifactSequence", "id": "U2VxOjE=", "name": artifact.name, "project": project}
            node = {
                "__typename": "Artifact",
                "id": base64.b64encode(f"Artifact:{artifact.id}".encode()).decode(),
                "artifactSequence": sequence,
                "versionIndex": number,
                "artifactType": {"name": "run_table"},
                "description": None,
                "metadata": "{}",
                "ttlDurationSeconds": -2,
                "ttlIsInherited": True,
                "tags": [],
                "historyStep": 0,
                "state": artifact.state,
                "size": sum(map(len, artifact.files.values())),
                "digest": "d",
                "digestAlgorithm": None,
                "commitHash": "c",
                "fileCount": len(artifact.files),
                "createdAt": TIME,
                "updatedAt": TIME,
                "aliases": [],
            }
            edges.append({"node": node, "cursor": str(number)})
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"project": {"run": {"artifacts": {"totalCount": len(own), "pageInfo": page, "edges": edges}}}}

    # -- reports -------------------------------------------------------------------------------------------------------

    def _project_internal_id(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"internalId": base64.b64encode(b"ProjectInternalId:1").decode()}}

    def _get_projects(self, variables: dict[str, Any]) -> dict[str, Any]:
        names = sorted({run.project for run in self.runs.values()})
        edges = [
            {
                "cursor": name,
                "node": {
                    "__typename": "Project",
                    "id": base64.b64encode(f"Project:{name}".encode()).decode(),
                    "name": name,
                    "entityName": ENTITY,
                    "createdAt": TIME,
                    "isBenchmark": False,
                    "internalId": base64.b64encode(b"ProjectInternalId:1").decode(),
                    "user": None,
                },
            }
            for name in names
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"edges": edges, "pageInfo": page}}

    def _upsert_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        is_new = not variables.get("id")
        if not is_new and variables["id"] not in self.reports:
            return {"upsertView": None}
        name = f"report{len(self.reports)}" if is_new else variables["id"]
        self.reports[name] = {**variables, "spec": json.loads(variables["spec"])}
        view = {
            "id": name,
            "type": variables["type"],
            "name": variables["name"],
            "displayName": variables["displayName"],
            "description": variables["description"],
            "project": {"id": "UHJvamVjdDox", "name": variables["projectName"], "entityName": ENTITY},
            "spec": variables["spec"],
            "createdAt": TIME,
            "updatedAt": TIME,
        }
        return {"upsertView": {"view": view, "inserted": is_new}}

    # -- rows and files ------------------------------------------------------------------------------------------------

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        """Takes rows and the summary as ``file_stream`` sends them."""
        with self.lock:
            run = self.runs[run_id]
            for name, part in (body.get("files") or {}).items():
                rows = [json.loads(line) for line in part["content"]]
                if name == "wandb-history.jsonl":
                    # A row that is sent again, because the answer was lost, has the same offset.
                    del run.history[part["offset"] :]
                    run.history += rows
                elif name == "wandb-summary.json" and rows:
                    run.summary = rows[-1]
            if body.get("complete"):
                run.exit_code = body.get("exitcode", 0)

    def put(self, kind: str, owner: str, name: str, content: bytes) -> None:
        """Takes a file of a run or of an artifact."""
        with self.lock:
            if kind == "run":
                run = self.runs[owner]
                run.files[name] = content
                if name == "wandb-summary.json":
                    run.summary = json.loads(content)
                return
            [artifact] = [one for one in self.artifacts if one.id == owner]
            if kind == "manifest":
                artifact.manifest = content
            else:
                artifact.files[name] = content


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    loopback: LoopbackServer

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self._body()
        if self.path.startswith("/graphql"):
            self._note_key()
            if self._misbehaves("graphql"):
                return
            given = json.loads(body)
            answer = self.loopback.answer(given["query"], given.get("variables") or {})
            self._send(200, json.dumps({"data": answer}).encode())
        elif self.path.endswith("/file_stream"):
            if self._misbehaves("file_stream"):
                return
            self.loopback.stream(self.path.split("/")[-2], json.loads(body))
            self._send(200, b'{"exitcode": null, "limits": {}}')
        else:
            self._send(404, b"{}")

    def do_PUT(self) -> None:
        body = self._body()
        if self._misbehaves("put"):
            return
        _, _, kind, owner, name = self.path.split("/", 4)
        self.loopback.put(kind, owner, name, body)
        self._send(200, b"{}")

    def do_GET(self) -> None:
        self._send(404, b"{}")

    def _misbehaves(self, kind: str) -> bool:
        fault = self.loopback.fault(kind)
        if fault == "hang":
            self.loopback.closing.wait(HANG_S)
            self.close_connection = True
            return True
        if fault is not None:
            self._send(int(fault), b'{"errors": [{"message": "injected"}]}')
            return True
        return False

    def _note_key(self) -> None:
        kind, _, text = self.headers.get("Authorization", "").partition(" ")
        if kind == "Basic":
            self.loopback.keys.add(base64.b64decode(text).decode().partition(":")[2])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        coding = self.headers.get("Content-Encoding", "")
        return gzip.decompress(body) if coding == "gzip" else zlib.decompress(body) if coding == "deflate" else body

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what some tests are about."""


@contextmanager
def loopback_server() -> Iterator[LoopbackServer]:
    """A server that listens while the block runs."""
    state = LoopbackServer()
    http = _Server(("127.0.0.1", 0), type("Requests", (_Requests,), {"loopback": state}))
    state.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        http.shutdown()
        http.server_close()
        thread.join(5)
