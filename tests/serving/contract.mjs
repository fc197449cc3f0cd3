// Every call of OpenAI's API that `phinetune serve` has, by the official client for JavaScript, unmodified.
//
//     OPENAI_BASE_URL=… OPENAI_API_KEY=… node tests/serving/contract.mjs MODEL MODEL_WITH_TOOLS
//
// Prints a line for each group of calls, and ends with status 0 if all of them did what the API says.

import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const [model, withTools] = process.argv.slice(2);
const client = new OpenAI({ maxRetries: 0 });
const messages = [{ role: "system", content: "be brief" }, { role: "user", content: "what is 7 · 8?" }];
const schema = {
  type: "object",
  properties: { word: { enum: ["yes", "no"] } },
  required: ["word"],
  additionalProperties: false,
};
const chats = Array.from({ length: 8 }, (_, i) => ({
  messages: [{ role: "user", content: `Say ${i}` }, { role: "assistant", content: `It is ${i}.` }],
}));
const lines = (rows) => rows.map((row) => JSON.stringify(row) + "\n").join("");
const upload = async (text, name = "rows.jsonl") =>
  client.files.create({ file: await toFile(Buffer.from(text), name), purpose: "fine-tune" });
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const all = async (list) => {
  const found = [];
  for await (const one of list) found.push(one);
  return found;
};

async function refused(call, status, code) {
  const error = await call().then(() => assert.fail("not refused"), (found) => found);
  assert.ok(error instanceof OpenAI.APIError, String(error));
  assert.equal(error.status, status, error.message);
  if (code) assert.equal(error.code, code);
  assert.ok(error.error.message);
  return error;
}

async function files() {
  const text = lines(chats);
  const file = await upload(text);
  assert.equal(file.filename, "rows.jsonl");
  assert.equal(file.bytes, Buffer.byteLength(text));
  assert.equal((await client.files.waitForProcessing(file.id)).status, "processed");
  assert.deepEqual(await client.files.retrieve(file.id), file);
  assert.equal(await (await client.files.content(file.id)).text(), text);
  const other = await upload(lines([{ prompt: "a", completion: " b" }]));
  const ids = (await all(client.files.list({ limit: 1, purpose: "fine-tune" }))).map((one) => one.id);
  assert.deepEqual(ids.slice(0, 2), [other.id, file.id]);
  assert.ok((await client.files.delete(other.id)).deleted);
  await refused(() => client.files.retrieve(other.id), 404);
  const bad = await refused(() => upload(lines([chats[0], { messages: [] }]) + "{broken\n"), 400, "invalid_file_format");
  assert.ok(bad.error.lines.length >= 1);
  await refused(async () => client.files.create({ file: await toFile(Buffer.from("{}"), "a"), purpose: "batch" }), 400);
  return file;
}

async function jobs(file) {
  const made = client.fineTuning.jobs;
  const held = await upload(lines(chats.slice(0, 2)), "held.jsonl");
  const job = await made.create({
    model,
    training_file: file.id,
    validation_file: held.id,
    suffix: "node",
    seed: 3,
    metadata: { from: "node" },
    method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2, batch_size: 4 } } },
  });
  assert.equal(job.status, "validating_files");
  const older = await made.create({ model, training_file: file.id, hyperparameters: { n_epochs: 1 } });
  assert.equal((await made.pause(older.id)).status, "paused");
  assert.ok(["validating_files", "queued"].includes((await made.resume(older.id)).status));
  assert.equal((await made.cancel(older.id)).status, "cancelled");
  await refused(() => made.cancel(older.id), 400);
  assert.deepEqual((await all(made.list({ metadata: { from: "node" } }))).map((one) => one.id), [job.id]);
  assert.deepEqual((await all(made.list({ limit: 1 }))).map((one) => one.id), [older.id, job.id]);
  await refused(() => made.create({ model, training_file: "file-none" }), 400, "file_not_found");
  await refused(() => made.create({ model: "gpt-4o-mini", training_file: file.id }), 404, "model_not_found");
  await refused(
    () => made.create({ model, training_file: file.id, method: { type: "reinforcement" } }), 400, "unsupported_value",
  );
  await refused(() => made.create({ model, training_file: file.id, method: { type: "dpo" } }), 400);
  await refused(() => made.retrieve("ftjob-none"), 404);
  return job;
}

async function ended(id) {
  for (;;) {
    const job = await client.fineTuning.jobs.retrieve(id);
    if (["succeeded", "failed", "cancelled"].includes(job.status)) return job;
    await sleep(300);
  }
}

async function trained(id) {
  const job = await ended(id);
  assert.equal(job.status, "succeeded", JSON.stringify(job.error));
  assert.match(job.fine_tuned_model, new RegExp(`^ft:${model}:phinetune:node:`));
  assert.equal(job.hyperparameters.n_epochs, 2);
  assert.ok(job.trained_tokens > 0);
  const events = await all(client.fineTuning.jobs.listEvents(id, { limit: 3 }));
  assert.equal(events[0].message, "The job has successfully completed");
  assert.ok(events.some((one) => one.type === "metrics" && one.data.train_loss > 0));
  const [checkpoint] = await all(client.fineTuning.jobs.checkpoints.list(id));
  assert.ok(checkpoint.metrics.valid_loss > 0);
  const table = await (await client.files.content(job.result_files[0])).text();
  assert.ok(table.startsWith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"));
  return [job.fine_tuned_model, checkpoint.fine_tuned_model_checkpoint];
}

async function models(tuned, checkpoint) {
  const names = (await all(client.models.list())).map((one) => one.id);
  for (const one of [model, tuned, checkpoint]) assert.ok(names.includes(one), one);
  assert.equal((await client.models.retrieve(tuned)).id, tuned);
  await refused(() => client.models.retrieve("gpt-4o"), 404, "model_not_found");
  await refused(() => client.models.delete(model), 403);
}

async function chat(name) {
  const asked = { model: name, messages, temperature: 0, max_completion_tokens: 12 };
  const whole = await client.chat.completions.create(asked);
  assert.equal(whole.object, "chat.completion");
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  const text = whole.choices[0].message.content;
  const chunks = await all(
    await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } }),
  );
  assert.equal(chunks.map((one) => one.choices[0]?.delta.content ?? "").join(""), text);
  assert.deepEqual(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
  const said = [];
  const runner = client.chat.completions.stream(asked).on("content", (delta) => said.push(delta));
  assert.equal(await runner.finalContent(), text);
  assert.equal(said.join(""), text);
  const more = { ...asked, temperature: 0.8, top_p: 0.9, seed: 5, n: 2, stop: ["never-there"], user: "me" };
  const [one, two] = [await client.chat.completions.create(more), await client.chat.completions.create(more)];
  assert.deepEqual(one.choices, two.choices);
  assert.equal(one.choices.length, 2);
  const told = await client.chat.completions.create({ ...asked, max_tokens: 4, logprobs: true, top_logprobs: 2 });
  assert.equal(told.choices[0].logprobs.content[0].top_logprobs.length, 2);
  return text;
}

async function forms() {
  const json = await client.chat.completions.create({
    model, messages, seed: 1, response_format: { type: "json_object" }, max_tokens: 40,
  });
  assert.ok(json.choices[0].message.content.startsWith("{"));
  const response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  const kept = await client.chat.completions.parse({ model, messages, seed: 2, response_format });
  assert.ok(["yes", "no"].includes(JSON.parse(kept.choices[0].message.content).word));
  const bad = { type: "json_schema", json_schema: { name: "bad", schema: { type: "nonsense" } } };
  await refused(
    () => client.chat.completions.create({ model, messages, response_format: bad }), 400, "invalid_json_schema",
  );
}

async function tools() {
  const parameters = { type: "object", properties: { city: { enum: ["Rome", "Oslo"] } }, required: ["city"] };
  const asked = {
    model: withTools, messages: messages.slice(1), seed: 1, tool_choice: "required",
    tools: [{ type: "function", function: { name: "weather", parameters } }],
  };
  const choice = (await client.chat.completions.create(asked)).choices[0];
  assert.equal(choice.finish_reason, "tool_calls");
  const [call] = choice.message.tool_calls;
  assert.ok(["Rome", "Oslo"].includes(JSON.parse(call.function.arguments).city));
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  const answered = [...asked.messages, choice.message, { role: "tool", tool_call_id: call.id, content: "sunny" }];
  assert.ok((await client.chat.completions.create({ ...asked, messages: answered, tool_choice: "none", max_tokens: 3 })).id);
  await refused(() => client.chat.completions.create({ ...asked, model }), 400, "unsupported_parameter");
}

async function kept() {
  const asked = { model, messages, max_tokens: 4, store: true, metadata: { from: "node" } };
  const made = await client.chat.completions.create(asked);
  assert.deepEqual((await client.chat.completions.retrieve(made.id)).choices, made.choices);
  assert.ok((await all(client.chat.completions.list({ metadata: { from: "node" } }))).some((one) => one.id === made.id));
  const said = await all(client.chat.completions.messages.list(made.id, { limit: 1 }));
  assert.deepEqual(said.map((one) => one.content), messages.map((one) => one.content));
  const changed = await client.chat.completions.update(made.id, { metadata: { from: "nobody" } });
  assert.deepEqual(changed.metadata, { from: "nobody" });
  assert.ok((await client.chat.completions.delete(made.id)).deleted);
  await refused(() => client.chat.completions.retrieve(made.id), 404);
}

async function responses() {
  const asked = { model, input: "hello", instructions: "be brief", temperature: 0, max_output_tokens: 6 };
  const first = await client.responses.create(asked);
  assert.equal(first.output_text, first.output[0].content[0].text);
  const events = await all(await client.responses.create({ ...asked, stream: true }));
  assert.equal(events[0].type, "response.created");
  assert.equal(events.filter((one) => one.type === "response.output_text.delta").map((one) => one.delta).join(""),
    first.output_text);
  assert.equal((await client.responses.stream(asked).finalResponse()).output_text, first.output_text);
  const next = await client.responses.create({ model, input: "more", previous_response_id: first.id, max_output_tokens: 3 });
  assert.equal(next.previous_response_id, first.id);
  assert.equal((await client.responses.retrieve(first.id)).output_text, first.output_text);
  const items = await all(client.responses.inputItems.list(next.id, { order: "asc" }));
  assert.deepEqual(items.map((one) => one.role), ["user", "assistant", "user"]);
  await client.responses.delete(first.id);
  await refused(() => client.responses.retrieve(first.id), 404);
  const format = { type: "json_schema", name: "answer", schema };
  const json = await client.responses.create({ model, input: "hi", text: { format } });
  assert.ok(["yes", "no"].includes(JSON.parse(json.output_text).word));
}

async function completions(tuned) {
  const asked = { model: tuned, prompt: "once upon", temperature: 0, max_tokens: 6 };
  const whole = await client.completions.create({ ...asked, logprobs: 1, echo: false });
  const chunks = await all(await client.completions.create({ ...asked, stream: true }));
  assert.equal(chunks.map((one) => one.choices[0].text).join(""), whole.choices[0].text);
}

async function errors() {
  const ask = (more) => () => client.chat.completions.create({ model, messages, max_tokens: 2, ...more });
  await refused(ask({ colour: "red" }), 400, "unknown_parameter");
  await refused(ask({ modalities: ["audio"] }), 400, "unsupported_parameter");
  await refused(ask({ temperature: 3 }), 400, "invalid_value");
  await refused(ask({ messages: [] }), 400);
  await refused(ask({ model: "gpt-4o" }), 404, "model_not_found");
  await refused(ask({ messages: [{ role: "user", content: "x".repeat(5000) }] }), 400, "context_length_exceeded");
  const stranger = new OpenAI({ apiKey: "sk-wrong", maxRetries: 0 });
  await refused(() => stranger.models.list(), 401, "invalid_api_key");
  const gone = new AbortController();
  const stream = await client.chat.completions.create({ model, messages, stream: true }, { signal: gone.signal });
  for await (const _ of stream) {
    gone.abort();
    break;
  }
}

const told = async (name, work) => {
  const found = await work();
  console.log(`${name}: as the API says`);
  return found;
};
const file = await told("files", files);
const job = await told("jobs", () => jobs(file));
await told("chat completions", () => chat(model));
await told("forms", forms);
await told("tools", tools);
await told("kept answers", kept);
await told("responses", responses);
await told("errors", errors);
const [tuned, checkpoint] = await told("events, checkpoints and results", () => trained(job.id));
await told("models", () => models(tuned, checkpoint));
assert.notEqual(await chat(tuned), undefined);
await told("a tuned model's completions", () => completions(tuned));
assert.ok((await client.models.delete(tuned)).deleted);
await refused(() => client.models.retrieve(tuned), 404);
console.log("all calls did what the API says");
