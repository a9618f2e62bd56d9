"""Reads requests, one a line in hexadecimal; says what h11 makes of the first in each, one JSON a line."""

import json
import sys

import h11


def parse(data):
    # The sizes of heads that are taken are a matter of taste, so h11's must not decide.
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    request, body = None, b""
    try:
        server.receive_data(data)
        while True:
            event = server.next_event()
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return {
                    "method": request.method.hex(),
                    "target": request.target.hex(),
                    "fields": [[name.hex(), value.hex()] for name, value in request.headers.raw_items()],
                    "body": body.hex(),
                }
            else:
                return {"incomplete": True}
    except h11.RemoteProtocolError as error:
        return {"error": str(error)}


for line in sys.stdin:
    print(json.dumps(parse(bytes.fromhex(line))))
