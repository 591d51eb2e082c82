"""Keeps an index of the subjects of each relation, and prints each entry that changes.

    python watch.py TENANT STATE_FILE [HOST:PORT]

It stands for any program that follows a tenant: a cache, a search index, materialized permissions. The rules in the comments are
those of ../README.md.
"""

import json
import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

# Compiles the .proto files at the start. For production, run `python -m grpc_tools.protoc` once instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "proto"))
watch_protos, watch_services = grpc.protos_and_services("base/v1/watch.proto")
data_protos, data_services = grpc.protos_and_services("base/v1/data.proto")

CHANNEL = [
    # A lost peer is silent. Without pings the client would wait for it for ever.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # How far the server may send ahead of us.
    ("grpc.http2.lookahead_bytes", 4 << 20),
]
# Temporary errors. Every other status needs a person, except those that `follow` handles.
PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED,
           grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
READ_AGAIN = {grpc.StatusCode.ABORTED, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.FAILED_PRECONDITION}
WAIT_MAX_SECONDS = 10


class Index:
    """Subjects by `document:1#viewer`, and the token of that state: saved together (rule 3)."""

    def __init__(self, path):
        self.path = Path(path)
        saved = json.loads(self.path.read_text()) if self.path.exists() else {"token": "", "subjects": {}}
        self.token = saved["token"]
        self.subjects = {key: set(subjects) for key, subjects in saved["subjects"].items()}

    def save(self, token):
        self.token = token
        subjects = {key: sorted(subjects) for key, subjects in sorted(self.subjects.items())}
        # Written to a second file and moved over the first: a crash here leaves either the old or the new state. With a database, put
        # the rows and the token into one transaction.
        beside = self.path.with_suffix(".new")
        with open(beside, "w") as file:
            json.dump({"token": token, "subjects": subjects}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def add(self, tuple_):
        key = key_of(tuple_)
        self.subjects.setdefault(key, set()).add(subject_of(tuple_))
        return key

    def apply(self, change):
        """Adds or removes an entry, whether it exists or not: the stream may repeat a change that was already read (rule 2)."""
        if change.WhichOneof("type") != "tuple":
            return  # Attributes come in the same way; this index has none.
        key = self.add(change.tuple)
        if change.operation == change.OPERATION_DELETE:
            self.subjects[key].discard(subject_of(change.tuple))
        print(f"{key} =", *sorted(self.subjects[key]), flush=True)


def key_of(tuple_):
    return f"{tuple_.entity.type}:{tuple_.entity.id}#{tuple_.relation}"


def subject_of(tuple_):
    subject = tuple_.subject
    return f"{subject.type}:{subject.id}" + (f"#{subject.relation}" if subject.relation else "")


def read_state(channel, tenant, start, index):
    """Reads everything. Pages are from different moments; the stream has the changes between them (rule 2)."""
    data = data_services.DataStub(channel)
    request = data_protos.RelationshipReadRequest(tenant_id=tenant, page_size=100)
    request.metadata.snap_token = start
    request.filter.SetInParent()
    index.subjects.clear()
    count = 0
    while True:
        page = data.ReadRelationships(request, timeout=30, metadata=credentials())
        for tuple_ in page.tuples:
            index.add(tuple_)
        count += len(page.tuples)
        if not page.continuous_token:
            print(f"read anew: {count} tuples", flush=True)
            return
        request.continuous_token = page.continuous_token


def credentials():
    token = os.environ.get("TUPLEWATCH_TOKEN")
    return [("authorization", f"Bearer {token}")] if token else []


def follow(channel, tenant, index):
    failures, token, is_complete = 0, index.token, bool(index.token)
    while True:
        request = watch_protos.WatchRequest(tenant_id=tenant, snap_token=token)
        stream = watch_services.WatchStub(channel).Watch(request, metadata=credentials())
        try:
            # Returns when the start is fixed: every later commit is in the stream (rule 1).
            start = dict(stream.initial_metadata()).get("snap-token")
            # A refused stream has no such header, and its status follows when it is read.
            if start and not is_complete:
                read_state(channel, tenant, start, index)
                index.save(start)
                token, is_complete = start, True
            for response in stream:
                failures = 0
                for change in response.changes.tuple_changes:
                    index.apply(change)
                token = response.changes.snap_token
                index.save(token)
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr, flush=True)
            next_token = next_snap_token(error)
            if error.code() == grpc.StatusCode.ABORTED and next_token:
                token, is_complete = next_token, False  # Rule 4: changes are missing before this token.
            elif error.code() in READ_AGAIN:
                token, is_complete = "", False  # Rule 4: there is no token to continue from.
            elif error.code() not in PASSING:
                raise
        finally:
            stream.cancel()  # The stream is still open if the read failed.
        # Rule 5. The wait is random, because other clients lost the same server.
        failures += 1
        time.sleep(random.uniform(0.5, 1) * min(WAIT_MAX_SECONDS, 0.1 * 2 ** min(failures, 10)))


def next_snap_token(error):
    status = rpc_status.from_call(error)
    for detail in status.details if status else []:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.metadata.get("next_snap_token")
    return None


def main():
    tenant, path, *server = sys.argv[1:]
    # Over TLS: grpc.secure_channel(server, grpc.ssl_channel_credentials(), CHANNEL).
    with suppress(KeyboardInterrupt), grpc.insecure_channel(server[0] if server else "localhost:3478", CHANNEL) as channel:
        follow(channel, tenant, Index(path))


main()
