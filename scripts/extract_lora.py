"""Extract a LoRA adapter: scripts/extract_lora.py BASE TUNED OUT (see --help)."""

from lm.cli.merge_tools import extract_lora

if __name__ == "__main__":
    extract_lora()
