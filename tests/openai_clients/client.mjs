// Does with openai-node what each line of standard input says, a JSON object, and tells on standard output
// what a program that uses the client would have seen. `client.py` is its twin.

import { createInterface } from "node:readline";
import { createRequire } from "node:module";

// The package lies where the test installed it: below the current directory.
const OpenAI = createRequire(process.cwd() + "/")("openai");

const ASKS = {
  chat: (client, body) => client.chat.completions.create(body),
  completion: (client, body) => client.completions.create(body),
  embedding: (client, body) => client.embeddings.create(body),
};

async function perform(order, seen) {
  const client = new OpenAI({
    baseURL: order.base_url,
    apiKey: order.key ?? "none",
    maxRetries: order.max_retries ?? 0,
    timeout: (order.timeout ?? 20) * 1000,
  });
  if (order.do === "models") {
    seen.answer = [];
    for await (const model of client.models.list()) seen.answer.push(model.id);
    return;
  }
  const answer = await ASKS[order.do](client, order.body);
  if (!order.body.stream) {
    seen.answer = answer;
    return;
  }
  for await (const chunk of answer) {
    seen.chunks.push(chunk);
    if (seen.chunks.length === order.leave_after) {
      seen.left_at = Date.now() / 1000;
      // Leaving the loop aborts the request.
      return;
    }
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const seen = { raised: null, chunks: [], answer: null };
  try {
    await perform(JSON.parse(line), seen);
  } catch (error) {
    seen.raised = {
      name: error.constructor.name,
      is_api_error: error instanceof OpenAI.APIError,
      status: error.status ?? null,
      code: error.code ?? null,
      message: String(error.message),
      retry_after: error.headers?.get?.("retry-after") ?? null,
      should_retry: error.headers?.get?.("x-should-retry") ?? null,
    };
  }
  console.log(JSON.stringify(seen));
}
