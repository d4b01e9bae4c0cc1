"""The peer of bench_generate.py: transformers' generate on PyTorch.

Runs in an environment of its own (PyTorch is no dependency of this project). With --make it writes
a checkpoint of random weights; without, it reads cases from standard input, one JSON object a line,
and answers each with one.
"""

import argparse
import json
import sys
import time

import torch
import transformers


def make(args) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(args.folder)


def serve(args) -> None:
    dtype = getattr(torch, args.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=dtype).eval()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        tokens = torch.tensor(case["prompts"])
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=case["new"],
                min_new_tokens=case["new"],
                pad_token_id=0,
            )
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": out[:, tokens.shape[1] :].tolist()}))
        sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--make", action="store_true")
    for name, default in (("layers", 12), ("width", 768), ("hidden", 2048), ("vocab", 32_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    if args.make:
        make(args)
    else:
        serve(args)


if __name__ == "__main__":
    main()
