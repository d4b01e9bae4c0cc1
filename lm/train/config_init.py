"""Where a run's first parameters come from: `--init.*`, read by `lm.train.init`."""

import dataclasses
from typing import Any

from lm.config import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The parameters that training starts from."""

    from_run: str = ""
    """A run folder or one of its checkpoints, whose parameters are taken; with model.adapter they
    are the frozen base. Empty: random, by the seed."""
    from_hf: str = ""
    """A Hugging Face checkpoint folder, whose parameters and tokenizer are taken; the model flags
    follow its config.json. With model.adapter they are the frozen base."""
    peft: str = ""
    """A folder of PEFT's with LoRA adapters of init.from_hf, whose training goes on; the flags of
    model.adapter follow its adapter_config.json."""

    task: str = ""
    """Whose corrections a folder of surgery, init.from_hf, has (lm.merging.adaptive), or "none"."""

    def __post_init__(self):
        check(
            bool(self.from_hf) or not self.task,
            f"init.task {self.task} is for a merged model given as init.from_hf",
        )
        check(
            not (self.from_run and self.from_hf),
            "init.from_run and init.from_hf are both given: parameters come from one of them",
        )
        check(
            not self.peft or bool(self.from_hf),
            f"init.peft {self.peft} needs its base: give the Hugging Face folder as init.from_hf",
        )


def check_adapter(config: Any) -> None:
    """Raise `ConfigError` for what a run (`RunConfig`) with a frozen base cannot do."""
    if config.model.adapter.kind == "none":
        return
    for name in ("mat", "adatask"):
        check(
            config.optim.name != name,
            f"optim.name {name} acts on the model's own parameters, which model.adapter freezes: "
            "use adamw, muon or spectra, or no adapter",
        )
    check(config.log.spectra == 0, "log.spectra is not for runs with model.adapter: leave it at 0")
