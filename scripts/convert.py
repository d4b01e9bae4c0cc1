"""Between Hugging Face folders, runs and Orbax: scripts/convert.py SRC DST (see --help)."""

from lm.cli.convert import main

if __name__ == "__main__":
    main()
