"""Does with openai-python what each line of standard input says, a JSON object, and tells on standard output
what a program that uses the client would have seen. `client.mjs` is its twin."""

import json
import sys
import time

import openai

ASKS = {
    "chat": lambda client, body: client.chat.completions.create(**body),
    "completion": lambda client, body: client.completions.create(**body),
    "embedding": lambda client, body: client.embeddings.create(**body),
}


def perform(order, seen):
    client = openai.OpenAI(
        base_url=order["base_url"],
        api_key=order.get("key", "none"),
        max_retries=order.get("max_retries", 0),
        timeout=order.get("timeout", 20),
    )
    with client:
        if order["do"] == "models":
            seen["answer"] = [model.id for model in client.models.list()]
            return
        answer = ASKS[order["do"]](client, order["body"])
        if not order["body"].get("stream"):
            seen["answer"] = answer.to_dict()
            return
        with answer:
            for chunk in answer:
                seen["chunks"].append(chunk.to_dict())
                if len(seen["chunks"]) == order.get("leave_after"):
                    seen["left_at"] = time.time()
                    return


for line in sys.stdin:
    seen = {"raised": None, "chunks": [], "answer": None}
    try:
        perform(json.loads(line), seen)
    except Exception as error:  # Whatever it is, the program would have noticed.
        headers = getattr(getattr(error, "response", None), "headers", {})
        seen["raised"] = {
            "name": type(error).__name__,
            "is_api_error": isinstance(error, openai.APIError),
            "status": getattr(error, "status_code", None),
            "code": getattr(error, "code", None),
            "message": str(error),
            "retry_after": headers.get("retry-after"),
            "should_retry": headers.get("x-should-retry"),
        }
    print(json.dumps(seen), flush=True)
