"""Make, and check, the fixtures of the Hugging Face tests. Needs PyTorch and transformers.

    python tests/lm/hf/make_fixtures.py make [FAMILY..]  writes fixtures/FAMILY and versions.json
    python tests/lm/hf/make_fixtures.py check FOLDER     FOLDER/FAMILY as `lm.hf.save` wrote them:
                                                         writes fixtures/loads_back.json

Every fixture is a tiny random checkpoint that transformers itself wrote, and expected.npz with what
transformers computes from it (eager attention, CPU):

    tokens [2, 40], logits        a plain batch
    padded, padded_mask, padded_logits    padded on the left; logits of padding are meaningless
    document_0.., document_logits_0..     documents, each run alone
    long_tokens, long_positions, long_logits    positions far beyond the original context
    likelihoods                   log-likelihood of tokens[:, 1:] in bfloat16
    prompt, greedy                64 tokens from generate() without sampling
    gap                           smallest difference of the two best logits on that way

Weights are drawn from a fixed seed, larger than a fresh model's, so that every norm, bias, cap and
window shows in the logits. Nothing here is imported by the tests.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARY = 96
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
CASES = {
    "llama": ("LlamaConfig", SIZES | dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama2": (
        "LlamaConfig",
        SIZES | dict(rope_parameters=LINEAR, attention_bias=True, mlp_bias=True, head_dim=12),
    ),
    "mistral": ("MistralConfig", SIZES | dict(rope_parameters=PLAIN, sliding_window=8)),
    "qwen2": (
        "Qwen2Config",
        SIZES
        | dict(
            rope_parameters=YARN,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        ),
    ),
    "qwen3": ("Qwen3Config", SIZES | dict(rope_parameters=PLAIN, head_dim=16)),
    "gemma2": (
        "Gemma2Config",
        SIZES
        | dict(
            rope_parameters=PLAIN,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
        ),
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        SIZES
        | dict(
            num_hidden_layers=4,
            head_dim=8,
            intermediate_size=32,
            query_pre_attn_scalar=12,
            sliding_window=8,
            layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": LINEAR | {"rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": PLAIN,
            },
        ),
    ),
    "olmo2": ("Olmo2Config", SIZES | dict(rope_parameters=PLAIN | {"rope_theta": 500_000.0})),
    "gpt2": (
        "GPT2Config",
        dict(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
}
EXPERTS = SIZES | dict(rope_parameters=PLAIN, intermediate_size=16, num_experts_per_tok=2)
CASES |= {
    "mixtral": ("MixtralConfig", EXPERTS | dict(num_local_experts=4, sliding_window=8)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        EXPERTS | dict(head_dim=8, num_experts=6, moe_intermediate_size=16, norm_topk_prob=True),
    ),
    "olmoe": ("OlmoeConfig", EXPERTS | dict(num_experts=6)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        EXPERTS
        | dict(
            num_hidden_layers=4,
            num_experts=6,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=12,
            decoder_sparse_step=2,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=2,
        ),
    ),
}
LATENT = dict(
    num_key_value_heads=4,
    num_hidden_layers=3,
    intermediate_size=24,
    moe_intermediate_size=8,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    first_k_dense_replace=1,
)
CASES |= {
    "deepseek_v2": (
        "DeepseekV2Config",
        EXPERTS
        | LATENT
        | dict(
            num_hidden_layers=2,
            rope_parameters=YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
            q_lora_rank=None,
            rms_norm_eps=1e-2,
            n_shared_experts=2,
            num_experts_per_tok=3,  # more than groups, or the best experts are in the best groups
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        EXPERTS
        | LATENT
        | dict(
            q_lora_rank=12,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            num_mtp_layers=0,
        ),
    ),
}
SHARDED = {"llama": "60KB"}
"""Written in several files."""


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Matrices at the scale of their inputs; norms around their neutral value; biases not 0."""
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if "embed" in name or "wte" in name or "wpe" in name:
            draw *= 0.5
        elif parameter.ndim >= 2:
            draw *= 1.5 / 32**0.5
        else:
            neutral = 0.0 if "bias" in name or "gemma" in type(model).__name__.lower() else 1.0
            draw = neutral + 0.3 * draw
        parameter.data.copy_(draw)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.data.copy_(0.05 * torch.randn(buffer.shape, generator=generator))


@torch.no_grad()
def expect(model, folder: Path, generator: torch.Generator, long: bool) -> dict[str, np.ndarray]:
    """What the tests compare with; `folder` holds the model."""

    def draw(*shape):
        return torch.randint(3, VOCABULARY, shape, generator=generator)

    def logits(tokens, **context):
        return model(tokens, use_cache=False, **context).logits.float().numpy()

    tokens = draw(2, 40)
    out = {"tokens": tokens.numpy(), "logits": logits(tokens)}
    padded, mask = draw(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out |= {"padded": padded.numpy(), "padded_mask": mask.numpy()}
    out["padded_logits"] = logits(padded, attention_mask=mask, position_ids=positions)
    for number, length in enumerate((9, 21, 14)):
        document = draw(1, length)
        out[f"document_{number}"] = document.numpy()
        out[f"document_logits_{number}"] = logits(document)
    if long:
        tokens, positions = draw(1, 24), 3000 + torch.arange(24)[None]
        out |= {"long_tokens": tokens.numpy(), "long_positions": positions.numpy()}
        out["long_logits"] = logits(tokens, position_ids=positions)
    prompt = draw(1, 8)
    done = model.generate(
        prompt,
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    best = torch.stack(done.logits)[:, 0].topk(2, dim=-1).values
    out |= {"prompt": prompt.numpy(), "greedy": done.sequences[:, 8:].numpy()}
    out["gap"] = (best[:, 0] - best[:, 1]).min().numpy()
    # Loaded anew: model.bfloat16() would round rotary frequencies and selection biases as well.
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.bfloat16
    ).eval()
    tokens = torch.from_numpy(out["tokens"])
    likelihoods = torch.from_numpy(logits(tokens)).log_softmax(-1)[:, :-1]
    out["likelihoods"] = likelihoods.gather(-1, tokens[:, 1:, None])[..., 0].numpy()
    integers = {k: v.astype(np.int32) for k, v in out.items() if v.dtype == np.int64}
    return out | integers


def make(names: list[str]) -> None:
    for number, (name, (kind, options)) in enumerate(CASES.items()):
        if names and name not in names:
            continue
        folder = FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        generator = torch.Generator().manual_seed(number)
        config = getattr(transformers, kind)(**options)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomize(model, generator)
        model.save_pretrained(folder, max_shard_size=SHARDED.get(name, "5GB"))
        (folder / "generation_config.json").unlink(missing_ok=True)
        expected = expect(model, folder, generator, long=name != "gpt2")
        np.savez_compressed(folder / "expected.npz", **expected)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name:12} {size:9,} bytes, smallest gap {expected['gap']:.4f}")
    write(FIXTURES / "versions.json", versions())


@torch.no_grad()
def check(written: Path) -> None:
    results = {}
    for name in CASES:
        folder = written / name
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        expected = np.load(FIXTURES / name / "expected.npz")
        logits = model(torch.from_numpy(expected["tokens"]).long(), use_cache=False).logits.numpy()
        results[name] = {
            "missing_keys": sorted(info["missing_keys"]),
            "unexpected_keys": sorted(info["unexpected_keys"]),
            "mismatched_keys": sorted(map(str, info["mismatched_keys"])),
            "largest_logit_difference": float(np.abs(logits - expected["logits"]).max()),
            "sha256": {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                for file in sorted(folder.glob("*"))
                if file.suffix in (".safetensors", ".json")
            },
        }
        print(name, {k: v for k, v in results[name].items() if k != "sha256"})
    write(FIXTURES / "loads_back.json", versions() | {"families": results})


def versions() -> dict[str, str]:
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(sys.argv[2:]) if sys.argv[1] == "make" else check(Path(sys.argv[2]))
