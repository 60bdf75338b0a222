"""An encoding in a process of its own: MODALITY PATH OUT WORKERS FIRST LAST."""

import signal
import sys

from tiny_encoder import encoder, slow_image, slow_text

from sotalign_jax.encoders.extract import Interrupted, extract
from sotalign_jax.encoders.sources import open_source


def main():
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    modality, path, out, workers, first, last = sys.argv[1:]
    source = open_source(path, modality, rows_per_shard=7)
    made = encoder(modality, slow_image if modality == "image" else slow_text)
    print("ready", flush=True)
    shards = int(first), int(last)
    try:
        extract(source, made, out, batch_size=3, workers=int(workers), shards=shards)
    except Interrupted as stop:
        sys.exit(f"{stop}")
    except KeyboardInterrupt:
        sys.exit("Ctrl-C")


if __name__ == "__main__":
    main()
