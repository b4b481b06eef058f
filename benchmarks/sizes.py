"""The sizes of every benchmark: on a GPU ("gpu"), for ops on the CPU ("cpu"), tiny ones that test the harness
("smoke"), and for sanitizers, tails everywhere ("odd"). What is only counted, beside "gpu", is "count".
"""

from __future__ import annotations

from dataclasses import dataclass

SETS = ("gpu", "cpu", "smoke", "odd", "count")


@dataclass(frozen=True)
class AdapterSize:
    """x [batch, tokens, hidden] through `experts` down banks of `rank` and one shared up bank."""

    batch: int
    tokens: int
    hidden: int
    rank: int
    experts: int = 4
    routing: str = "sample"
    dtype: str = "bfloat16"

    @property
    def words(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.hidden} r{self.rank} M{self.experts} {self.routing}"


@dataclass(frozen=True)
class LoraSize:
    """x [batch, tokens, features] -> [batch, tokens, width]; two groups are q and v of a fused qkv layer."""

    batch: int
    tokens: int
    features: int
    width: int
    rank: int
    experts: int = 4
    groups: int = 1
    routing: str = "sample"
    dtype: str = "bfloat16"

    @property
    def words(self) -> str:
        sizes = f"{self.batch}x{self.tokens}x{self.features} to {self.width}"
        return f"{sizes} r{self.rank} M{self.experts} groups{self.groups} {self.routing}"

    @property
    def offsets(self) -> tuple[int, ...]:
        """First output column of each group."""
        return (0,) if self.groups == 1 else (0, self.width * 2 // 3)

    @property
    def per_group(self) -> int:
        """Output columns of a group."""
        return self.width if self.groups == 1 else self.width // 3


@dataclass(frozen=True)
class PackSize:
    """x [batch, tokens, features] -> [batch, tokens, width] by `experts` LoRAs, each with its own A and B; an adapter a
    sample ("sample"), or a token, in any order ("token") or in the adapters' own ("sorted")."""

    batch: int
    tokens: int
    features: int
    width: int
    rank: int
    experts: int
    routing: str
    dtype: str = "bfloat16"

    @property
    def words(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.features} to {self.width} r{self.rank} M{self.experts} {self.routing}"


@dataclass(frozen=True)
class GateSize:
    """x [batch, tokens, features] -> [batch, tokens, width] by `slots` of `experts`: all: dense, 0: one, no gate.

    shared: one expert up for all of down.
    """

    batch: int
    tokens: int
    features: int
    width: int
    rank: int
    experts: int
    slots: int
    mix: str = "outputs"
    dtype: str = "bfloat16"
    shared: bool = False

    @property
    def words(self) -> str:
        kind = "token" if not self.slots else "dense" if self.slots == self.experts else f"top{self.slots}"
        sizes = f"{self.batch}x{self.tokens}x{self.features} to {self.width}"
        kind += " weights" * (self.mix == "weights") + " shared" * self.shared
        return f"{sizes} r{self.rank} M{self.experts} {kind}"


@dataclass(frozen=True)
class MixtureSize:
    """A layer x [batch, tokens, width] -> the same of eight LoRAs of rank 8; kind: of mixtures/layer.py."""

    batch: int
    tokens: int
    width: int
    kind: str
    dtype: str = "bfloat16"

    @property
    def dimensions(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.width

    @property
    def words(self) -> str:
        return f"{self.kind} {self.batch}x{self.tokens} K=N={self.width} M=8 r=8"


@dataclass(frozen=True)
class DecodeSize:
    """A token through 24 layers of a Llama of that width."""

    width: int
    dtype: str = "bfloat16"

    @property
    def words(self) -> str:
        return f"24 layers, width {self.width}, 1 token"


@dataclass(frozen=True)
class RouterSize:
    """x [batch, tokens, features] -> gates of all `experts`, or of the largest `slots`; weights are float32."""

    batch: int
    tokens: int
    features: int
    experts: int
    slots: int
    dtype: str = "bfloat16"

    @property
    def words(self) -> str:
        kind = "dense" if self.slots == self.experts else f"top{self.slots}"
        return f"{self.batch}x{self.tokens}x{self.features} M{self.experts} {kind}"


@dataclass(frozen=True)
class LossSize:
    """`rows` pairs of rows (one of each pass) of `vocab` logits; hidden 0: from logits, else through a head."""

    rows: int
    vocab: int
    hidden: int = 0
    dtype: str = "bfloat16"

    @property
    def words(self) -> str:
        return f"2x{self.rows}x{self.vocab}" + (f" D{self.hidden}" if self.hidden else "")


@dataclass(frozen=True)
class BankSize:
    """The adapters of a whole model: per layer a down and an up bank of `experts`, with biases."""

    layers: int
    experts: int
    rank: int
    hidden: int
    dtype: str = "float32"

    @property
    def words(self) -> str:
        return f"{self.layers} layers M{self.experts} r{self.rank} H{self.hidden}"


@dataclass(frozen=True)
class StepSize:
    """A training step of a randomly initialised model: batch x tokens before doubling."""

    model: str
    batch: int
    tokens: int
    rank: int
    experts: int = 4

    @property
    def words(self) -> str:
        return f"{self.batch}x{self.tokens} M{self.experts} r{self.rank} {self.model}"


# N = 8,192 and 65,536 tokens as the goals say; what training sends (one expert a pass); BERT's widths.
ADAPTER_8K = AdapterSize(16, 512, 1024, 16)
ADAPTER_64K = AdapterSize(128, 512, 1024, 16)
LORA_8K = LoraSize(16, 512, 1024, 1024, 16)
LORA_64K = LoraSize(128, 512, 1024, 1024, 16)
LORA_GPT2 = LoraSize(2, 4096, 1024, 3072, 4, experts=8, groups=2, routing="batch")
LOSS_GPT2 = LossSize(8192, 50257)
LOSS_LLAMA = LossSize(8192, 128256)
GLUE = (LossSize(64, 2, dtype="float32"), LossSize(64, 3, dtype="float32"))
HEAD_GPT2 = LossSize(8192, 50257, hidden=1024)
HEAD_LLAMA = LossSize(8192, 128256, hidden=1024)
HEAD_MEMORY = LossSize(4096, 50257, hidden=1024)
# RoBERTa-large's layers and width, at a rank that makes 403 MB of experts.
BANKS = BankSize(24, 4, 512, 1024)

ADAPTER = {
    "gpu": (
        ADAPTER_8K,
        ADAPTER_64K,
        AdapterSize(2, 4096, 1024, 16, routing="batch"),
        AdapterSize(64, 128, 768, 48),
        AdapterSize(16, 512, 1024, 16, routing="token"),
        AdapterSize(16, 512, 1024, 16, dtype="float32"),
    ),
    "count": (
        AdapterSize(128, 512, 1024, 48),
        AdapterSize(128, 512, 1024, 64),
        AdapterSize(128, 512, 1024, 16, dtype="float16"),
        AdapterSize(64, 128, 768, 48, dtype="float16"),
    ),
    "cpu": (
        AdapterSize(16, 128, 768, 48, routing="batch", dtype="float32"),
        AdapterSize(16, 128, 768, 48, dtype="float32"),
        AdapterSize(16, 128, 768, 16, routing="token", dtype="float32"),
    ),
    "smoke": (
        AdapterSize(2, 8, 32, 8, routing="batch", dtype="float32"),
        AdapterSize(3, 8, 32, 8, routing="token", dtype="bfloat16"),
    ),
    "odd": (
        AdapterSize(3, 37, 72, 5, experts=3),
        AdapterSize(3, 37, 72, 5, experts=3, routing="token", dtype="float32"),
    ),
}
LORA = {
    "gpu": (LORA_8K, LORA_64K, LORA_GPT2),
    "count": (LoraSize(16, 512, 1024, 1024, 48), LoraSize(16, 512, 1024, 1024, 8, dtype="float16")),
    "cpu": (
        LoraSize(16, 128, 768, 768, 8, dtype="float32"),
        LoraSize(2, 512, 1024, 3072, 4, experts=8, groups=2, routing="batch", dtype="float32"),
    ),
    "smoke": (
        LoraSize(4, 8, 32, 32, 8, dtype="float32"),
        LoraSize(2, 8, 32, 48, 4, groups=2, routing="batch", dtype="bfloat16"),
    ),
    "odd": (
        LoraSize(3, 37, 40, 56, 5, experts=3),
        LoraSize(3, 37, 40, 51, 3, groups=2, routing="token", dtype="float32"),
    ),
}
LORA_LINEAR = {
    "gpu": (LORA_8K, LORA_GPT2),
    "count": (),
    "cpu": LORA["cpu"],
    "smoke": LORA["smoke"][:1],
    "odd": LORA["odd"][:1],
}
# 4,096 rows of 64 adapters: documents, tokens of any order, sorted, and a step of generation.
LORA_PACK = {
    "gpu": (),
    "count": (
        *(PackSize(64, 64, 1024, 1024, 16, 64, routing) for routing in ("sample", "token", "sorted")),
        PackSize(4096, 1, 1024, 1024, 16, 64, "sample"),
    ),
    "cpu": (),
    "smoke": tuple(PackSize(4, 8, 32, 32, 4, 6, routing, "float32") for routing in ("sample", "token", "sorted")),
    "odd": (PackSize(3, 37, 40, 56, 5, 7, "token"),),
}
# One expert a token, then all of LoRAMoE's, two of MoLA's, SMEAR's mean; more columns than a tile holds; a V100's.
GATED_LORA = {
    "gpu": (),
    "count": (
        *(GateSize(8, 512, 1024, 1024, 8, 8, slots) for slots in (0, 8, 2)),
        GateSize(8, 512, 1024, 1024, 8, 8, 8, "weights"),
        *(GateSize(16, 512, 1024, 1024, 16, 64, slots) for slots in (0, 2)),
        *(GateSize(8, 512, 1024, 1024, 8, 8, slots, dtype="float16") for slots in (0, 8, 2)),
    ),
    "cpu": (),
    "smoke": (
        GateSize(2, 8, 32, 32, 4, 3, 0, dtype="float32"),
        GateSize(2, 8, 32, 32, 4, 3, 3, dtype="float32"),
        GateSize(2, 8, 32, 32, 4, 3, 2, dtype="float32"),
        GateSize(2, 8, 32, 32, 4, 3, 3, "weights", dtype="float32"),
    ),
    "odd": (
        *(GateSize(3, 37, 40, 56, 5, 7, slots) for slots in (0, 7, 2)),
        GateSize(3, 37, 40, 56, 5, 7, 7, "weights"),
    ),
}
GATED_ADAPTER = {
    "gpu": (),
    "count": (
        *(GateSize(16, 512, 1024, 1024, r, 8, slots) for r in (8, 16) for slots in (0, 8, 2)),
        *(GateSize(16, 512, 1024, 1024, r, 8, 8, "weights") for r in (8, 16)),
        *(GateSize(16, 512, 1024, 1024, 16, 8, slots, shared=True) for slots in (0, 8)),
        *(GateSize(16, 512, 1024, 1024, 16, 64, slots) for slots in (0, 2)),
        *(GateSize(16, 512, 1024, 1024, 8, 8, slots, dtype="float16") for slots in (0, 8, 2)),
    ),
    "cpu": (),
    "smoke": GATED_LORA["smoke"],
    "odd": tuple(GateSize(3, 37, 72, 72, 5, 7, slots) for slots in (0, 7, 2)),
}
ROUTER = {
    "gpu": (),
    "count": (
        *(RouterSize(batch, 512, 1024, 8, slots) for batch in (16, 8) for slots in (8, 2)),
        RouterSize(1, 1, 1024, 8, 2),
    ),
    "cpu": (),
    "smoke": (RouterSize(2, 8, 32, 3, 3, dtype="float32"), RouterSize(2, 8, 32, 3, 2, dtype="float32")),
    "odd": (RouterSize(3, 37, 72, 7, 2),),
}
# Of which GATED_LORA and ROUTER have the parts.
MIXTURE_LORA = {
    "gpu": (),
    "count": tuple(GateSize(8, 512, 1024, 1024, 8, 8, slots) for slots in (8, 2)),
    "cpu": (),
    "smoke": tuple(GateSize(2, 8, 32, 32, 4, 3, slots, dtype="float32") for slots in (3, 2)),
    "odd": (GateSize(3, 37, 40, 56, 5, 7, 2),),
}
LOSS = {
    "gpu": (LOSS_GPT2, LOSS_LLAMA, *GLUE),
    "count": (LossSize(8192, 30522), LossSize(8192, 50257, dtype="float16")),
    "cpu": (LossSize(512, 50257, dtype="float32"), *GLUE),
    "smoke": (LossSize(6, 37, dtype="bfloat16"), LossSize(4, 2, dtype="float32")),
    "odd": (LossSize(5, 1031), LossSize(7, 3, dtype="float32")),
}
RESCALED = (LOSS_GPT2,)
CONSISTENCY = {
    "gpu": (LOSS_GPT2,),
    "count": (),
    "cpu": LOSS["cpu"],
    "smoke": (LossSize(6, 37, dtype="float32"),),
    "odd": (LossSize(5, 1031),),
}
HEAD = {
    "gpu": (HEAD_MEMORY, HEAD_GPT2, HEAD_LLAMA),
    "count": (),
    "cpu": (LossSize(512, 50257, hidden=768, dtype="float32"),),
    "smoke": (LossSize(6, 37, hidden=16, dtype="float32"),),
    "odd": (LossSize(5, 1031, hidden=24),),
}
MERGE_BANKS = {
    "gpu": (BANKS,),
    "count": (BankSize(24, 4, 48, 1024),),
    "cpu": (BankSize(24, 4, 64, 1024),),
    "smoke": (BankSize(2, 3, 4, 16),),
    "odd": (BankSize(2, 3, 5, 37),),
}
MERGE_EXPERTS = {
    "gpu": (BankSize(1, 4, 16384, 1024),),
    "count": (),
    "cpu": (BankSize(1, 4, 4096, 1024),),
    "smoke": (BankSize(1, 3, 4, 16),),
    "odd": (BankSize(1, 3, 5, 37),),
}
MERGE_LORA = {
    "gpu": (LoraSize(24, 1, 1024, 1024, 16, routing="layers"),),
    "count": (),
    "cpu": (LoraSize(24, 1, 1024, 1024, 16, routing="layers", dtype="float32"),),
    "smoke": (LoraSize(2, 1, 16, 16, 4, routing="layers", dtype="float32"),),
    "odd": (LoraSize(2, 1, 37, 19, 5, routing="layers", dtype="float32"),),
}
STEPS = {
    "gpu": {
        "bert-base": (StepSize("bert-base", 16, 128, 48), StepSize("bert-base", 64, 128, 48)),
        "roberta-large": (StepSize("roberta-large", 16, 128, 16), StepSize("roberta-large", 64, 128, 16)),
        "gpt2-medium": (StepSize("gpt2-medium", 8, 512, 4, experts=8),),
    },
    "smoke": {"tiny": (StepSize("tiny", 2, 8, 8),), "tiny-gpt2": (StepSize("tiny-gpt2", 2, 8, 4),)},
}
INFERENCE = {"gpu": (StepSize("roberta-large", 16, 128, 16),), "smoke": (StepSize("tiny", 2, 8, 8),)}
# A mixture's layer in each kind, and 24 layers of them that decode.
MIXTURE = {
    "gpu": tuple(MixtureSize(8, 512, 1024, kind) for kind in ("dense", "top-2", "arrow top-2")),
    "smoke": tuple(MixtureSize(2, 5, 16, kind, "float32") for kind in ("dense", "top-2", "arrow top-2")),
}
DECODE = {"gpu": (DecodeSize(1024),), "smoke": (DecodeSize(32, "float32"),)}
