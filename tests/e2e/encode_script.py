"""`launch/encode.py` that also writes a line to the file $ENCODED for each clip it encodes, for tests to count."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    import cogds.encode.encoder
    from cogds.cli import call, run

    encode_pixels = cogds.encode.encoder.encode_pixels

    def counted(vae, pixels, tiled):
        with open(os.environ["ENCODED"], "a") as log:
            log.write("clip\n")
        return encode_pixels(vae, pixels, tiled)

    cogds.encode.encoder.encode_pixels = counted
    sys.exit(run(lambda: call("encode", sys.argv[1:], starts_ranks=False)))
