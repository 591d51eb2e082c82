// Keeps an index of the subjects of each relation, and prints each entry that changes.
//
//     node watch.js TENANT STATE_FILE [HOST:PORT]
//
// It stands for any program that follows a tenant: a cache, a search index, materialized permissions. The rules in the comments are
// those of ../README.md.
"use strict";

const { once } = require("node:events");
const fs = require("node:fs");
const path = require("node:path");
const { setTimeout: sleep } = require("node:timers/promises");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const protobuf = require("protobufjs");

const { base } = grpc.loadPackageDefinition(
  loader.loadSync(["base/v1/watch.proto", "base/v1/data.proto"], {
    includeDirs: [path.join(__dirname, "../../proto")], defaults: true, enums: String, oneofs: true,
  }));

const CHANNEL = {
  // A lost peer is silent. Without pings the client would wait for it for ever.
  "grpc.keepalive_time_ms": 20_000,
  "grpc.keepalive_timeout_ms": 10_000,
  // How far the server may send ahead of us.
  "grpc-node.flow_control_window": 4 << 20,
};
// Temporary errors. Every other status needs a person, except those that `follow` handles.
const { status } = grpc;
const PASSING = [status.UNAVAILABLE, status.RESOURCE_EXHAUSTED, status.DEADLINE_EXCEEDED, status.INTERNAL, status.UNKNOWN,
  status.CANCELLED];
const READ_AGAIN = [status.ABORTED, status.OUT_OF_RANGE, status.FAILED_PRECONDITION];
const WAIT_MAX_MS = 10_000;

// Subjects by `document:1#viewer`, and the token of that state: saved together (rule 3).
class Index {
  constructor(file) {
    this.file = file;
    const saved = fs.existsSync(file) ? JSON.parse(fs.readFileSync(file, "utf8")) : { token: "", subjects: {} };
    this.token = saved.token;
    this.subjects = new Map(Object.entries(saved.subjects).map(([key, subjects]) => [key, new Set(subjects)]));
  }

  // Written to a second file and moved over the first: a crash here leaves either the old or the new state. With a database, put
  // the rows and the token into one transaction.
  save(token) {
    this.token = token;
    const subjects = Object.fromEntries([...this.subjects].map(([key, subjects]) => [key, [...subjects].sort()]));
    const file = fs.openSync(`${this.file}.new`, "w");
    fs.writeSync(file, JSON.stringify({ token, subjects }));
    fs.fsyncSync(file);
    fs.closeSync(file);
    fs.renameSync(`${this.file}.new`, this.file);
  }

  add({ entity, relation, subject }) {
    const key = `${entity.type}:${entity.id}#${relation}`;
    if (!this.subjects.has(key)) this.subjects.set(key, new Set());
    this.subjects.get(key).add(textOf(subject));
    return key;
  }

  // Adds or removes an entry, whether it exists or not: the stream may repeat a change that was already read (rule 2).
  apply({ operation, type, tuple }) {
    if (type !== "tuple") return; // Attributes come in the same way; this index has none.
    const key = this.add(tuple);
    const subjects = this.subjects.get(key);
    if (operation === "OPERATION_DELETE") subjects.delete(textOf(tuple.subject));
    console.log([key, "=", ...[...subjects].sort()].join(" "));
  }
}

const textOf = ({ type, id, relation }) => `${type}:${id}${relation && `#${relation}`}`;

// Reads everything. Pages are from different moments; the stream has the changes between them (rule 2).
async function readState(data, tenantId, snapToken, index) {
  const request = { tenantId, metadata: { snapToken }, filter: {}, pageSize: 100, continuousToken: "" };
  index.subjects.clear();
  let count = 0;
  do {
    const page = await new Promise((resolve, reject) => {
      const done = (error, page) => (error ? reject(error) : resolve(page));
      data.readRelationships(request, credentials(), { deadline: Date.now() + 30_000 }, done);
    });
    for (const tuple of page.tuples) index.add(tuple);
    count += page.tuples.length;
    request.continuousToken = page.continuousToken;
  } while (request.continuousToken);
  console.log(`read anew: ${count} tuples`);
}

function credentials() {
  const metadata = new grpc.Metadata();
  const token = process.env.TUPLEWATCH_TOKEN;
  if (token) metadata.set("authorization", `Bearer ${token}`);
  return metadata;
}

async function follow(address, tenantId, index) {
  // Over TLS: grpc.credentials.createSsl().
  const secrets = grpc.credentials.createInsecure();
  const watch = new base.v1.Watch(address, secrets, CHANNEL);
  const data = new base.v1.Data(address, secrets, CHANNEL);
  let [failures, token, isComplete] = [0, index.token, index.token !== ""];
  for (;;) {
    const stream = watch.watch({ tenantId, snapToken: token }, credentials());
    stream.on("error", () => {}); // Errors are handled below. Without a listener, an error at any other time would end the process.
    try {
      // Arrives when the start is fixed: every later commit is in the stream (rule 1).
      const [headers] = await once(stream, "metadata");
      // A refused stream has no such header, and its status follows when it is read.
      const start = headers.get("snap-token")[0];
      if (start && !isComplete) {
        await readState(data, tenantId, start, index);
        index.save(start);
        [token, isComplete] = [start, true];
      }
      for await (const { changes } of stream) {
        failures = 0;
        for (const change of changes.tupleChanges) index.apply(change);
        token = changes.snapToken;
        index.save(token);
      }
    } catch (error) {
      if (!(error.code in status)) throw error;
      console.error(`${status[error.code]}: ${error.details}`);
      const next = nextSnapToken(error);
      if (error.code === status.ABORTED && next) {
        [token, isComplete] = [next, false]; // Rule 4: changes are missing before this token.
      } else if (READ_AGAIN.includes(error.code)) {
        [token, isComplete] = ["", false]; // Rule 4: there is no token to continue from.
      } else if (!PASSING.includes(error.code)) {
        throw error;
      }
    } finally {
      stream.cancel(); // The stream is still open if the read failed.
    }
    // Rule 5. The wait is random, because other clients lost the same server.
    failures += 1;
    await sleep((0.5 + Math.random() / 2) * Math.min(WAIT_MAX_MS, 100 * 2 ** Math.min(failures, 10)));
  }
}

// The details of an error are a google.rpc.Status that contains a google.rpc.ErrorInfo.
const rpc = protobuf.parse(`syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`).root;

function nextSnapToken(error) {
  const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const details = bytes ? rpc.lookupType("Status").decode(bytes).details : [];
  const info = details.find(({ typeUrl }) => typeUrl.endsWith("/google.rpc.ErrorInfo"));
  return info && rpc.lookupType("ErrorInfo").decode(info.value).metadata.next_snap_token;
}

const [tenantId, file, address = "localhost:3478"] = process.argv.slice(2);
follow(address, tenantId, new Index(file)).catch((error) => {
  console.error(error);
  process.exit(1);
});
