"""What a training run is: small frozen dataclasses, each validated where it is made.

The command line is generated from these classes (`lm/cli`), so a field's docstring is its help.
"""

import dataclasses
import math
from typing import Literal

from lm.config import ConfigError, ModelConfig, check, check_positive
from lm.train.config_data import DataConfig
from lm.train.config_init import InitConfig, check_adapter
from lm.train.config_mat import MatConfig
from lm.train.config_sd import SDConfig, check_sd

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GuardConfig",
    "InitConfig",
    "LogConfig",
    "MatConfig",
    "MeshConfig",
    "OptimConfig",
    "ProfileConfig",
    "QuantConfig",
    "RunConfig",
    "SDConfig",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, schedule, clipping."""

    name: str = "adamw"
    """A registered optimizer (`lm.train.optimizer.OPTIMIZERS`): adamw, muon, spectra, adatask
    (one task for each source of a mixture); or mat, which wraps
    another (`--mat.base`)."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Shape after the warm-up. wsd: constant, then linear decay over the last decay_fraction."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    decay_fraction: float = 0.2
    """wsd: share of all steps spent in the final decay."""
    final_fraction: float = 0.1
    """Last learning rate as a share of the peak."""
    weight_decay: float = 0.1
    """Decoupled, scaled by the learning rate; on matrices only (no norms, biases, embeddings)."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    """muon, spectra: momentum of the matrix part."""
    rank_ratio: float = 0.015
    """spectra: share of a matrix's singular directions that are its spike (the paper's 1.5 %)."""
    min_rank: int = 1
    """spectra: smallest number of spike directions; 8 to 16 are advised below a width of 512."""
    rank: Literal["share", "auto"] = "share"
    """spectra: auto takes for the spike what stands above noise, at most rank_ratio."""
    power_iters: int = 1
    """spectra: sweeps of the power iteration a step."""
    nesterov: bool = False
    """spectra: look one step ahead along the momentum."""
    normalization: Literal["none", "factored"] = "none"
    """spectra: factored divides the update by averages of its rows' and columns' squares."""
    tasks: int = 0
    """adatask: the number of sources; left at 0 it is that of the mixture."""
    joint_tasks: bool = False
    """adatask: one second moment for all sources, which is AdamW, to compare dominance with."""
    sequential_tasks: bool = False
    """adatask: one backward pass after the other, which saves memory."""
    dominance_decay: float = 0.0
    """adatask: decay of the averages behind the metric dominance/SOURCE (0.99, say), which cost a
    copy of the parameters for each source; 0 keeps none."""
    clip: float = 1.0
    """Largest global gradient norm (of each source's gradient under adatask); 0 turns clipping
    off."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment."""

    def __post_init__(self):
        check_positive(self, "learning_rate", "eps")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optim.{name} must lie in [0, 1), got {value}")
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            good = value >= 0 and math.isfinite(value)
            check(good, f"optim.{name} must be 0 or more, got {value}")
        self._check_tasks()
        share = self.rank_ratio
        check(0 <= share <= 1, f"optim.rank_ratio must lie in [0, 1], got {share}")
        check(self.min_rank >= 0, f"optim.min_rank must be 0 or more, got {self.min_rank}")
        check_positive(self, "power_iters")
        check(self.warmup_steps >= 0, f"optim.warmup_steps must be >= 0, got {self.warmup_steps}")
        check(
            0 < self.decay_fraction <= 1,
            f"optim.decay_fraction must lie in (0, 1], got {self.decay_fraction}",
        )
        check(
            0 <= self.final_fraction <= 1,
            f"optim.final_fraction must lie in [0, 1], got {self.final_fraction}",
        )

    def _check_tasks(self):
        decay = self.dominance_decay
        check(0 <= decay < 1, f"optim.dominance_decay must lie in [0, 1), got {decay}")
        check(self.tasks >= 0, f"optim.tasks must be 0 or more, got {self.tasks}")
        for name in ("tasks", "joint_tasks", "sequential_tasks", "dominance_decay"):
            check(
                not getattr(self, name) or self.name == "adatask",
                f"optim.{name} is only for optim.name adatask, and it is {self.name}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Low-precision arithmetic of the linear layers."""

    recipe: str = "none"
    """A recipe of `quant.RECIPES`, such as nvidia or metis_mean; none multiplies in model.dtype."""
    high: tuple[str, ...] = ("head", "*router*")
    """Shell patterns of the products that stay in high precision."""
    keep_first: int = 0
    """The first so many blocks stay in high precision."""
    keep_last: float = 0.0
    """The last so many blocks stay in high precision; below 1 a share of all (NVIDIA: 0.15)."""
    refresh: int = 0
    """Metis: steps between new bases; 0 leaves it to the recipe."""
    evaluate: Literal["quantized", "high"] = "quantized"
    """Products of evaluations: those of training, or in model.dtype."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices along each mesh axis; their product is the number of devices used."""

    data: int = -1
    """Data parallel replicas; -1 takes all devices that the other axes leave."""
    fsdp: int = 1
    """Data parallel with parameters and optimizer state sharded."""
    tensor: int = 1
    """Heads, MLP width and vocabulary sharded."""
    expert: int = 1
    """Experts sharded, and the batch."""
    context: int = 1
    """Sequences cut, for those that are too long for one device."""
    replica: int = 1
    """Data parallel over a slower network (slices of a TPU, say): gradients meet once a step."""
    sequence_norms: bool = True
    """Under tensor: norms and residual sums each on a share of the tokens."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is bool:
                continue
            size = getattr(self, field.name)
            check(
                size >= 1 or (field.name == "data" and size == -1),
                f"mesh.{field.name} must be 1 or more"
                + (" or -1" if field.name == "data" else "")
                + f", got {size}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step's update is thrown away and when the run gives up."""

    spike_sigma: float = 6.0
    """Skip a step whose loss or gradient norm exceeds the rolling mean by this many standard
    deviations; 0 skips only steps that are not finite."""
    window: int = 128
    """Steps in the rolling statistics; nothing is called a spike before a quarter is filled."""
    max_consecutive: int = 10
    """Stop with a checkpoint after this many skipped steps in a row."""

    def __post_init__(self):
        check(self.spike_sigma >= 0, f"guard.spike_sigma must be >= 0, got {self.spike_sigma}")
        check(self.window >= 8, f"guard.window must be 8 or more, got {self.window}")
        check_positive(self, "max_consecutive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is saved and what is kept."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints kept; the best by evaluation loss is kept besides."""
    patience: float = 600.0
    """Seconds for which storage may fail before the run stops; until then it is tried again."""
    local_dir: str = ""
    """A folder on every node's own disk for checkpoints in between; empty makes none."""
    local_every: int = 50
    """Steps between local checkpoints."""

    def __post_init__(self):
        check_positive(self, "every", "keep", "local_every")
        good = self.patience >= 0 and math.isfinite(self.patience)
        check(good, f"checkpoint.patience must be 0 or more seconds, got {self.patience}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out data during training."""

    every: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    batches: int = 16
    """Batches per evaluation, always the same ones."""

    def __post_init__(self):
        check_positive(self, "every", "batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training."""

    every: int = 10
    """Steps between rows of metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard events too (extra: tensorboard)."""
    progress: bool = True
    """Show a progress bar."""
    spectra: int = 0
    """Steps between rows that describe the spectra of weights and momenta; 0 writes none."""
    quant: int = 0
    """Steps between rows that describe what quantization does to each layer; 0 writes none."""
    experts: int = 0
    """Steps between rows that say what experts have in common; 0 writes none."""

    def __post_init__(self):
        check_positive(self, "every")
        for name in ("spectra", "quant", "experts"):
            every = getattr(self, name)
            check(every >= 0, f"log.{name} must be 0 or more, got {every}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A window of steps traced by the JAX profiler into OUT/profile."""

    start: int = 0
    """First step traced."""
    steps: int = 0
    """Steps traced; 0 traces none."""
    on_signal: int = 5
    """Steps traced whenever the process gets SIGUSR1; 0 leaves the signal alone."""

    def __post_init__(self):
        check(self.start >= 0, f"profile.start must be 0 or more, got {self.start}")
        for name in ("steps", "on_signal"):
            value = getattr(self, name)
            check(value >= 0, f"profile.{name} must be 0 or more, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a training run."""

    recipe: str = "tiny"
    """Name of the recipe this run started from."""
    out: str = ""
    """Run folder; empty is runs/RECIPE-DATE-TIME."""
    resume: bool = False
    """Continue the run in OUT from its newest good checkpoint, or start it if there is none."""
    steps: int = 1000
    """Optimizer steps in the whole run."""
    seed: int = 0
    """Seed of initialization and data order."""
    batch_size: int = 32
    """Sequences per step over all devices."""
    sequence_length: int = 256
    """Tokens per sequence."""
    micro_batches: int = 1
    """Gradient accumulation: the batch is worked through in this many equal parts."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mat: MatConfig = dataclasses.field(default_factory=MatConfig)
    sd: SDConfig = dataclasses.field(default_factory=SDConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    flags: Literal["auto", "off"] = "auto"
    """Compiler flags for more overlap, by backend and version (lm/xla_flags.py); off adds none."""
    sample_prompt: str = "def "
    """Prompt of the text sampled at the end; empty samples nothing."""

    def __post_init__(self):
        check_positive(self, "steps", "batch_size", "sequence_length", "micro_batches")
        check(0 <= self.seed < 2**31, f"seed must lie in [0, 2^31), got {self.seed}")
        check(
            self.batch_size % self.micro_batches == 0,
            f"batch_size ({self.batch_size}) must be a multiple of micro_batches "
            f"({self.micro_batches})",
        )
        check(
            self.sequence_length <= self.model.max_context,
            f"sequence_length ({self.sequence_length}) exceeds model.max_context "
            f"({self.model.max_context})",
        )
        check(
            self.optim.warmup_steps <= self.steps,
            f"optim.warmup_steps ({self.optim.warmup_steps}) exceeds steps ({self.steps})",
        )
        cut = 2 * self.mesh.context
        check(
            self.mesh.context == 1 or self.sequence_length % cut == 0,
            f"sequence_length ({self.sequence_length}) must be a multiple of {cut}, twice "
            f"mesh.context ({self.mesh.context}): each device holds two parts of a sequence",
        )
        check(
            self.mesh.replica == 1 or self.optim.name != "adatask",
            f"optim.name adatask has no form for mesh.replica {self.mesh.replica}: use mesh.data",
        )
        self._check_optimizer()
        check_adapter(self)
        check_sd(self)

    def _check_optimizer(self):
        """A flag that the chosen optimizer would not read is a mistake, not a wish."""
        name = self.optim.name
        if name != "mat":
            for field in _changed(self.mat):
                check(False, f"mat.{field} is given but optim.name is {name}: add --optim.name mat")
        matrices = self.mat.base if name == "mat" else name
        for field in _changed(self.optim).intersection(_SPECTRA):
            check(
                matrices == "spectra",
                f"optim.{field} is only for optim.name spectra, and it is {name}"
                + (f" over {matrices}" if name == "mat" else ""),
            )


_SPECTRA = {"rank_ratio", "min_rank", "rank", "power_iters", "nesterov", "normalization"}


def _changed(config) -> set[str]:
    """Fields that differ from their defaults."""
    return {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
