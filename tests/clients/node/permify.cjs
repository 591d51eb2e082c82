// What a team that uses Permify does with Permify's own client, against the address that is given. Ends with 0 if all of it
// is as it should be.
"use strict";

const assert = require("node:assert/strict");
const permify = require("@permify/permify-node");

const { base } = permify.grpc;
const client = permify.grpc.newClient({ endpoint: process.argv[2], insecure: true });
const tenantId = "shop";
const { OPERATION_CREATE: CREATE, OPERATION_DELETE: DELETE } = base.DataChange_Operation;

const tuple = (id, subject, relation = "") => ({
  entity: { type: "order", id },
  relation: "viewer",
  subject: { type: relation ? "group" : "user", id: subject, relation },
});

const attribute = (id, name, kind, data) => ({
  entity: { type: "order", id },
  attribute: name,
  value: { typeUrl: `type.googleapis.com/base.v1.${kind}`, value: base[kind].encode({ data }).finish() },
});

const metadata = { snapToken: "", schemaVersion: "" };
const write = async (tuples, attributes = []) =>
  (await client.data.write({ tenantId, metadata, tuples, attributes })).snapToken;

// Code and message of a refusal, as the client's errors have them.
async function refused(call) {
  const error = await call.then(() => assert.fail("it should be refused"), (error) => error);
  return [error.code, error.details];
}

const isCreate = (change) => change.operation === CREATE;
// The texts of a message's changes.
const texts = (changes) =>
  changes.dataChanges.map(({ operation, type }) => {
    assert.ok(operation === CREATE || operation === DELETE);
    const fact = type[type.$case];
    const name = type.$case === "tuple" ? `@${fact.subject.id}` : `$${fact.attribute}`;
    return `${isCreate({ operation }) ? "+" : "-"}${fact.entity.id}${name}`;
  });

// The next messages after a token: as many as are asked for, and then the stream is left.
async function watch(snapToken, count) {
  const messages = [];
  for await (const { changes } of client.watch.watch({ tenantId, snapToken })) {
    messages.push(changes);
    if (messages.length === count) break;
  }
  return messages;
}

async function main() {
  const { tenant } = await client.tenancy.create({ id: tenantId, name: "the shop" });
  assert.equal(tenant.id, tenantId);
  assert.ok(Math.abs(tenant.createdAt - new Date()) < 600_000);
  assert.deepEqual(await refused(client.tenancy.create({ id: tenantId, name: "" })), [6, "ERROR_CODE_UNIQUE_CONSTRAINT"]);
  const { tenants } = await client.tenancy.list({ pageSize: 20, continuousToken: "" });
  assert.ok(tenants.some(({ id, name }) => id === tenantId && name === "the shop"));

  // Watch, and resume with the token of each message.
  const start = await write([tuple("1", "ada")]);
  const second = await write([tuple("1", "ops", "member"), tuple("2", "ada")], [attribute("1", "paid", "BooleanValue", true)]);
  await write([], [attribute("1", "paid", "BooleanValue", false), attribute("1", "tags", "StringArrayValue", ["a", "b"])]);
  const messages = await watch(start, 2);
  assert.deepEqual(messages.map(texts), [["+1@ops", "+2@ada", "+1$paid"], ["-1$paid", "+1$paid", "+1$tags"]]);
  assert.deepEqual(await watch(messages[0].snapToken, 1), [messages[1]]);
  assert.deepEqual(await watch(second, 1), [messages[1]]);
  const tags = messages[1].dataChanges[2].type.attribute.value;
  assert.equal(tags.typeUrl, "type.googleapis.com/base.v1.StringArrayValue");
  assert.deepEqual(base.StringArrayValue.decode(tags.value).data, ["a", "b"]);

  // Read what was just written, by pages.
  const filter = { entity: { type: "order", ids: [] }, relation: "", subject: undefined };
  const snapToken = await write([tuple("3", "ada")]);
  const found = [];
  let continuousToken = "";
  do {
    const page = await client.data.readRelationships(
      { tenantId, metadata: { snapToken }, filter, pageSize: 3, continuousToken });
    found.push(...page.tuples.map(({ entity, subject }) => `${entity.id}@${subject.id}#${subject.relation}`));
    continuousToken = page.continuousToken;
  } while (continuousToken !== "");
  assert.deepEqual(found, ["1@ops#member", "1@ada#", "2@ada#", "3@ada#"]);
  const read = await client.data.readAttributes({
    tenantId, metadata: { snapToken }, filter: { entity: { type: "order", ids: ["1"] }, attributes: ["paid"] },
    pageSize: 100, continuousToken: "",
  });
  assert.deepEqual(read.attributes, [attribute("1", "paid", "BooleanValue", false)].map((expected) => ({
    ...expected, value: { ...expected.value, value: read.attributes[0].value.value },
  })));
  assert.equal(base.BooleanValue.decode(read.attributes[0].value.value).data, false);

  // Delete, and see it.
  await client.data.delete({
    tenantId,
    tupleFilter: { entity: { type: "order", ids: ["1"] }, relation: "viewer", subject: { type: "user", ids: ["ada"], relation: "" } },
    attributeFilter: { entity: { type: "order", ids: ["1"] }, attributes: ["tags"] },
  });
  assert.deepEqual((await watch(snapToken, 1)).map(texts), [["-1@ada", "-1$tags"]]);

  // Refusals are told by Permify's names.
  assert.deepEqual(await refused(write([tuple("not an id", "ada")])), [3, "ERROR_CODE_VALIDATION"]);
  const everything = { tenantId, tupleFilter: {}, attributeFilter: {} };
  assert.deepEqual(await refused(client.data.delete(everything)), [3, "ERROR_CODE_VALIDATION"]);
  const wrong = { tenantId, metadata, filter, pageSize: 1, continuousToken: "x" };
  assert.deepEqual(await refused(client.data.readRelationships(wrong)), [3, "ERROR_CODE_INVALID_CONTINUOUS_TOKEN"]);
  const nobody = { tenantId: "nobody", metadata, tuples: [tuple("1", "ada")], attributes: [] };
  assert.deepEqual(await refused(client.data.write(nobody)), [5, "ERROR_CODE_TENANT_NOT_FOUND"]);

  // A stream that is open sees its tenant go.
  const last = await write([tuple("4", "ada")]);
  const stream = client.watch.watch({ tenantId, snapToken: last })[Symbol.asyncIterator]();
  const next = stream.next();
  assert.equal((await client.tenancy.delete({ id: tenantId })).tenantId, tenantId);
  const gone = texts((await next).value.changes);
  assert.deepEqual(gone, ["-1@ops", "-2@ada", "-3@ada", "-4@ada", "-1$paid"]);
  await stream.return();
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
