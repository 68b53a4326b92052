"""`python -m vbdcompress`, and what torchrun starts: `torchrun ... -m vbdcompress run ...`."""

from vbdcompress.cli import main

if __name__ == "__main__":
    main()
