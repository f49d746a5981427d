"""Training steps of GPT-2, optimizer included, at a context of 1024:
``python -m benchmarks.train --out DIR``. How it is measured: :mod:`benchmarks.harness`.

Every contestant trains the same fp32 weights under bf16 autocast, with AdamW at a rate of 0, so
that the weights stay what they are. FLOPs of a token are ``6 N + 12 layers width T``, as in
Chowdhery et al. 2022 (arXiv:2204.02311) appendix B, with N the parameters but for the positions:
their TFLOP/s by the GPU's peak are its MFU. The gate compares the loss, and all gradients together,
with fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lm import use_backend
from fused_lm.lm.gpt import GPT, GPTConfig
from fused_lm.lm.step import LossModule

from . import block, command, contest
from .contest import Contestant, Given, Run, Work
from .harness import MOST_ERROR

VOCABULARY, CONTEXT = 50304, 1024
MOST_ERROR_OF_ONE = 0.3
"""Of one tensor's gradient by its norm; a gradient that is left out is off by 1."""


@dataclass(frozen=True)
class Case:
    """A GPT-2 and the batch of a step."""

    label: str
    layers: int
    width: int
    heads: int
    batch: int
    context: int = CONTEXT
    vocabulary: int = VOCABULARY

    @property
    def name(self) -> str:
        return f"gpt2-{self.label} b{self.batch} t{self.context} autocast bfloat16"

    @property
    def block(self) -> block.Case:
        tokens = self.batch * self.context
        return block.Case(self.width, self.heads, self.context, tokens=tokens)

    def given(self, device: torch.device) -> Given:
        config = GPTConfig(
            vocab_size=self.vocabulary,
            context=self.context,
            num_layers=self.layers,
            embed_dim=self.width,
            num_heads=self.heads,
            activation="gelu_tanh",
        )
        model = GPT(config, device=device)
        shape = (self.batch, self.context + 1)
        text = torch.randint(self.vocabulary, shape, device=device)
        values: dict[str, Any] = {
            "model": model,
            "weights": dict(model.named_parameters()),
            "tokens": text[:, :-1].contiguous(),
            "targets": text[:, 1:].contiguous(),
            "device": device.type,
        }
        leaves = list(model.parameters())
        optimizer = torch.optim.AdamW(leaves, lr=0.0, fused=True)
        loss = formula(self, values)
        exact = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        one = torch.ones((), device=device)
        return Given(values, leaves, one, partial(error_of, exact), optimizer)

    def work(self) -> dict[str, Work]:
        tokens = self.batch * self.context
        flops = tokens * (6.0 * self.parameters() + 12.0 * self.layers * self.width * self.context)
        return {"train": Work(flops, 4.0 * 7 * self.parameters(), tokens)}

    def parameters(self) -> int:
        """Without the positions'."""
        vectors = 4 * self.width + 3 * self.width + self.width + 4 * self.width + self.width
        layer = self.block.matrix_elements() + vectors
        return self.layers * layer + 2 * self.width + self.vocabulary * self.width


def grid(dry: bool) -> list[Case]:
    """Of 16k tokens a step; on a CPU two tiny ones."""
    if dry:
        return [Case(name, 1, 16, heads, 1, 8, 48) for name, heads in (("tiny", 1), ("tiny 2", 2))]
    return [Case("124M", 12, 768, 12, 16), Case("350M", 24, 1024, 16, 16)]


def error_of(exact: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest of the loss' error, that of all gradients together, and a part of each tensor's
    own: small ones, whose share of the whole is nothing, are noisier, but not wrong.
    """
    loss = contest.relative_error(got[:1], exact[:1])
    pairs = list(zip(got[1:], exact[1:], strict=True))
    off = torch.stack([(mine.double() - truth.double()).norm() for mine, truth in pairs])
    norm = torch.stack([truth.double().norm() for _, truth in pairs])
    together, worst = off.norm() / norm.norm(), (off / norm.clamp_min(1e-30)).max()
    found = torch.stack([together, worst * MOST_ERROR / MOST_ERROR_OF_ONE]).cpu()
    return float(torch.cat([found, torch.tensor([loss], dtype=found.dtype)]).max())


def formula(case: Case, values: dict[str, Any]) -> Tensor:
    """A GPT-2 of PyTorch's own operators, on the weights of ours, in whatever precision it is
    called.
    """
    weights = values["weights"]
    x = weights["tokens.weight"][values["tokens"]] + weights["positions.weight"]
    for layer in range(case.layers):
        prefix = f"blocks.{layer}."
        own = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        x = block.plain_block(case.block, x, own)
    x = F.layer_norm(x, (case.width,), weights["norm.weight"], weights["norm.bias"], block.EPS)
    logits = F.linear(x, weights["tokens.weight"])
    return F.cross_entropy(logits.float().flatten(0, 1), values["targets"].flatten())


def ours(backend: str, compiled: bool, case: Case, values: dict[str, Any]) -> Run:
    tokens, targets = values["tokens"], values["targets"]
    if compiled:
        contest.check_compiles()
    module = LossModule(values["model"])
    call = torch.compile(module, dynamic=False) if compiled else module

    def loss() -> Tensor:
        with use_backend(backend):
            result: Tensor = call(tokens, targets)
            return result

    return autocast(loss, values["device"])


def plain(compiled: bool, case: Case, values: dict[str, Any]) -> Run:
    if compiled:
        contest.check_compiles()
    run = torch.compile(formula, dynamic=False) if compiled else formula
    return autocast(lambda: run(case, values), values["device"])


def hugging_face(case: Case, values: dict[str, Any]) -> Run:
    """transformers' GPT-2, on the same weights: its matrices are transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=case.vocabulary,
        n_positions=case.context,
        n_embd=case.width,
        n_layer=case.layers,
        n_head=case.heads,
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).to(values["device"])
    weights = values["weights"]
    named = {"transformer.wte.weight": weights["tokens.weight"]}
    named["lm_head.weight"] = weights["tokens.weight"]
    named["transformer.wpe.weight"] = weights["positions.weight"]
    for kind in ("weight", "bias"):
        named[f"transformer.ln_f.{kind}"] = weights[f"norm.{kind}"]
    tokens, targets = values["tokens"], values["targets"].flatten()

    def loss() -> Tensor:
        for layer in range(case.layers):
            for mine, theirs in HUGGING_FACE_NAMES.items():
                own = weights[f"blocks.{layer}.{mine}"]
                named[f"transformer.h.{layer}.{theirs}"] = own.t() if own.dim() == 2 else own
        logits = torch.func.functional_call(model, named, (tokens,)).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets)

    return autocast(loss, values["device"])


HUGGING_FACE_NAMES = {
    f"{mine}.{kind}": f"{theirs}.{kind}"
    for mine, theirs in (
        *(("norm1", "ln_1"), ("qkv", "attn.c_attn"), ("out_proj", "attn.c_proj")),
        *(("norm2", "ln_2"), ("ffn.up", "mlp.c_fc"), ("ffn.down", "mlp.c_proj")),
    )
    for kind in ("weight", "bias")
}


def autocast(run: Run, device: str) -> Run:
    def wrapped() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return run()

    return wrapped


CONTESTANTS = [
    Contestant("fused_lm", partial(ours, "auto", False), compiles=True),
    Contestant("fused_lm compiled", partial(ours, "auto", True), compiles=True),
    Contestant("triton", partial(ours, "triton", False), compiles=True),
    Contestant("eager", partial(plain, False)),
    Contestant("compiled", partial(plain, True), compiles=True),
    Contestant("hugging-face", hugging_face),
]

if __name__ == "__main__":
    command.main("train", grid, CONTESTANTS, "tokens_per_s")
