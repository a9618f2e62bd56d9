"""Serves a model with llama.cpp's own HTTP server: serve.py MODEL PORT SLOTS

The wheel runs that server on threads of its own, so all that is left here is to stay. SIGTERM and
SIGINT end the process at once.
"""

import signal
import sys

import xllamacpp


def main(model, port, slots):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.model_alias = {"tiny-random"}
    settings.hostnames = ["127.0.0.1"]
    settings.port = int(port)
    settings.n_parallel = int(slots)
    settings.endpoint_slots = True
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    print("llama.cpp listens on", server.listening_address, flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
