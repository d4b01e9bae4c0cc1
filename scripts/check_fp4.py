"""How exact the FP4 quantizers are: golden vectors, published errors, other libraries' bits.

    PEER_PYTHON scripts/check_fp4.py --torchao FILE.npz    # in an environment with torchao
    python scripts/check_fp4.py --compare FILE.npz         # writes docs/results/fp4_correctness.md

Inputs are made by NumPy from a seed, so that both sides see the same bits. qwix is compared with if
it is installed (extra: dev).
"""

import argparse
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
CASES = ("normal", "outliers", "wide", "tiny")


def inputs(case: str) -> np.ndarray:
    """float32 [256, 512]."""
    rng = np.random.default_rng(CASES.index(case))
    x = rng.standard_normal((256, 512)).astype(np.float32)
    if case == "outliers":
        x[:, ::64] *= 100
    if case == "wide":
        x *= np.exp(3 * rng.standard_normal((256, 1))).astype(np.float32)
    if case == "tiny":
        x *= np.float32(1e-20)
    return x


def torchao(path: str) -> int:
    """What torchao's reference functions make of the inputs, dequantized, into an npz file."""
    import torch
    import torchao as ao
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    found = {"version": ao.__version__}
    for case in CASES:
        x = torch.from_numpy(inputs(case))
        amax = x.abs().max().item()
        decode = torch.tensor(np.float32(1) / (np.float32(2688) / np.float32(amax)))
        scales, codes = nvfp4_quantize(x, 16, decode)
        found[f"nvfp4/{case}/codes"] = codes.view(torch.uint8).numpy()
        found[f"nvfp4/{case}/scales"] = scales.view(torch.uint8).numpy().reshape(256, -1)
        for mode in ("FLOOR", "RCEIL"):
            scale, data = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[mode])
            back = to_dtype(data, scale, torch.float4_e2m1fn_x2, 32, torch.float32)
            found[f"mxfp4/{mode}/{case}"] = back.numpy()
    np.savez_compressed(path, **found)
    print(f"wrote {path}, torchao {ao.__version__}")
    return 0


def compare(path: str | None) -> list[tuple[str, str, str]]:
    """(what, peer, share of equal results and what the others are)."""
    import dataclasses

    import jax.numpy as jnp

    import quant

    rows = []
    if path:
        peer = np.load(path)
        name = f"torchao {peer['version']}"
        floor = dataclasses.replace(quant.NVFP4, name="nvfp4_floor", underflow="floor")
        for case in CASES:
            q = quant.quantize(jnp.asarray(inputs(case)), floor, axis=-1)
            scales = np.asarray(q.scales).view(np.uint8)
            same_scales = np.mean(scales == peer[f"nvfp4/{case}/scales"])
            mine, other = (_nibbles(c) for c in (np.asarray(q.codes), peer[f"nvfp4/{case}/codes"]))
            codes = np.mean(mine == other)
            rows.append((f"NVFP4, {case}: codes; scales", name, f"{codes:.4%}; {same_scales:.4%}"))
        for mode, rule in (("FLOOR", "floor"), ("RCEIL", "ceil")):
            fmt = dataclasses.replace(quant.MXFP4, name=f"mxfp4_{rule}", rule=rule)
            for case in CASES:
                mine = np.asarray(quant.fake_quant(jnp.asarray(inputs(case)), fmt, axis=-1))
                equal = np.mean(mine == peer[f"mxfp4/{mode}/{case}"])
                rows.append((f"MXFP4 {rule}, {case}: values", name, f"{equal:.4%}"))
    return rows + _qwix()


def _qwix() -> list[tuple[str, str, str]]:
    try:
        import qwix
        from qwix._src.core import qarray
    except ImportError:
        return []
    import dataclasses

    import jax.numpy as jnp

    import quant

    rows = []
    one_level = dataclasses.replace(quant.NVFP4, name="nvfp4_one_level", tensor_scale=False)
    for qtype, fmt, tile in (("mxfp4", quant.MXFP4, 32), ("nvfp4", one_level, 16)):
        for case in CASES:
            x = jnp.asarray(inputs(case))
            how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=[0], tiled_axes={1: tile})
            try:
                theirs = np.asarray(qarray.dequantize(qarray.quantize(x, how)), np.float32)
            except Exception as error:  # a peer's failure is a finding, not ours
                rows.append((f"{qtype}, {case}", "qwix", f"fails: {type(error).__name__}"))
                continue
            mine = np.asarray(quant.fake_quant(x, fmt, axis=-1))
            text = f"{np.mean(mine == theirs):.4%}"
            rows.append((f"{fmt.name}, {case}: values", f"qwix {qwix.__version__}", text))
    return rows


def _nibbles(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes & 15, codes >> 4], -1)


def errors() -> list[tuple[str, float, str]]:
    """(scheme, mean squared error x 1e-3 on N(0, 1), published)."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    import quant

    x = jax.random.normal(jax.random.key(0), (4096, 2048))
    ideal = dataclasses.replace(quant.NVFP4, name="ideal", scale="f32", tensor_scale=False)
    floor = dataclasses.replace(quant.MXFP4, name="floor", rule="floor")
    key = jax.random.key(1)
    schemes = (
        ("NVFP4, nearest, 1 x 16", dict(fmt=quant.NVFP4), "9.0 (arXiv 2601.22813, table 1)"),
        ("NVFP4, nearest, 16 x 16", dict(fmt=quant.NVFP4, block_2d=True), "12.4 (same)"),
        (
            "NVFP4, stochastic with headroom 17/16",
            _random(quant.NVFP4, key, 17 / 16),
            "23.5 (same)",
        ),
        ("NVFP4, stochastic, no headroom (biased)", _random(quant.NVFP4, key, 1.0), "-"),
        ("NVFP4, nearest, unrounded block scales", dict(fmt=ideal), "-"),
        ("MXFP4, nearest, ceil", dict(fmt=quant.MXFP4), "-"),
        ("MXFP4, nearest, floor", dict(fmt=floor), "-"),
    )
    found = []
    for name, how, published in schemes:
        error = jnp.mean(jnp.square(quant.fake_quant(x, axis=-1, **how) - x))
        found.append((name, float(error) * 1e3, published))
    return found


def _random(fmt, key, headroom):
    return dict(fmt=fmt, rounding="stochastic", key=key, sr_headroom=headroom)


GOLDEN = (
    (".03 -.4 1 2.7 -3.1 0 .55 -.75 1.25 5 -6.3 4.4 .9 -1.9 2.5 7", "7e", "0924d01926f62b47"),
    (
        ".0013 -.0021 .0004 .003 -.0029 .0017 .0001 -.0007 .0025 .0011 -.0003 .0019 .0023 -.0015 "
        ".0005 -.0009",
        "24",
        "5e27f50b74966d2c",
    ),
    (" ".join(["1e-5"] * 16), "00", "7" * 16),
    (" ".join(["0"] * 16), "00", "0" * 16),
)
"""Rows of one tensor; E4M3 scale byte; codes in hex, element 0 first: Transformer Engine's rule."""


def golden() -> list[tuple[str, str, bool]]:
    """(scale byte, codes, whether both came out) for each row."""
    import jax.numpy as jnp

    import quant

    x = jnp.asarray([[float(v) for v in row.split()] for row, _, _ in GOLDEN], jnp.float32)
    q = quant.quantize(x, quant.NVFP4, axis=1)
    scales = np.asarray(q.scales).view(np.uint8)[:, 0]
    codes = _nibbles(np.asarray(q.codes)).reshape(len(GOLDEN), -1)
    return [
        (scale, text, f"{s:02x}" == scale and "".join(f"{c:x}" for c in row) == text)
        for (_, scale, text), s, row in zip(GOLDEN, scales, codes, strict=True)
    ]


def write(path: str | None) -> int:
    import jax

    from lm.files import atomic_write_text

    lines = [
        "# FP4: is the arithmetic right?",
        "",
        f"`python scripts/check_fp4.py --compare FILE`, jax {jax.__version__}, CPU.",
        "",
        "## Golden vector",
        "",
        "Four rows of one tensor (largest magnitude 7) by Transformer Engine's arithmetic:",
        "",
        "| E4M3 scale | codes | reproduced |",
        "|---|---|---|",
        *(f"| 0x{s} | {c} | {'bit for bit' if ok else 'NO'} |" for s, c, ok in golden()),
        "",
        "## Mean squared error on N(0, 1), 4096 x 2048, in 1e-3",
        "",
        "| scheme | measured | published |",
        "|---|---|---|",
        *(f"| {name} | {error:.2f} | {published} |" for name, error, published in errors()),
        "",
        "## The same bits as other libraries",
        "",
        "Float32 inputs [256, 512]: normal; with 1 of 64 channels a hundred times larger; with "
        "rows of very different size; times 1e-20.",
        "",
        "| what | against | equal |",
        "|---|---|---|",
        *(f"| {what} | {peer} | {text} |" for what, peer, text in compare(path)),
        "",
        NOTES.strip(),
        "",
    ]
    atomic_write_text(RESULTS / "fp4_correctness.md", "\n".join(lines))
    print("\n".join(lines))
    return 0


NOTES = """
Explained: qwix divides by 1 where a scale is below 1e-19, so the inputs times 1e-20 become zeros in
its MXFP4 (its NVFP4 has no tensor scale, and both round them to zero). Its released 0.1.8 takes the
`ceil` rule for MXFP4; its later sources have the one that is `rule="oas"` here. torchao floors the
scale of a block that underflows (`underflow="floor"` here); Transformer Engine, our default, leaves
it zero. microxcaling is on no package index and was not compared with.

Stochastic rounding, Hadamard transforms and the three products of every recipe are tested against
float64 references in `tests/quant/`.
"""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--torchao", metavar="FILE")
    parser.add_argument("--compare", metavar="FILE")
    args = parser.parse_args(argv)
    return torchao(args.torchao) if args.torchao else write(args.compare)


if __name__ == "__main__":
    sys.exit(main())
