"""Generate text: scripts/generate.py RUN PROMPT (see --help)."""

from lm.cli.generate import main

if __name__ == "__main__":
    main()
