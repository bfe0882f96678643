// Ask a gateway with the official client for Node, and print what came as JSON.
//   node openai_client.mjs http://127.0.0.1:PORT/v1
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const asked = { model: "pydoc", messages: [{ role: "user", content: "hello" }] };
const found = {};

found.model = (await client.models.retrieve("pydoc")).id;
const { data, response } = await client.chat.completions.create(asked).withResponse();
found.chat = data.choices[0].message.content;
found.version = response.headers.get("x-ratchet-version");

found.streamed = "";
for await (const chunk of await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
})) {
  found.streamed += chunk.choices[0]?.delta.content ?? "";
  found.tokens = chunk.usage?.completion_tokens;
}

const chosen = await client.chat.completions.create({ ...asked, n: 2, temperature: 1 });
found.choices = chosen.choices.map((choice) => choice.message.content);
found.response = (await client.responses.create({ model: "pydoc", input: "hello" })).output_text;

const stream = client.responses.stream({ model: "pydoc", input: "hello" });
found.events = new Set();
for await (const event of stream) found.events.add(event.type);
found.events = [...found.events];
found.collected = (await stream.finalResponse()).output_text;

try {
  await client.responses.create({ model: "pydoc", input: "hello", previous_response_id: "resp_1" });
} catch (error) {
  found.refused = [error.status, error.param];
}
console.log(JSON.stringify(found));
