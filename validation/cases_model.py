"""What the words of a row say about its model: family, gates, heads, attention, tied weights."""

from __future__ import annotations

import re
from typing import Any

from validation.cases import Case, CaseError

FAMILIES = ("gpt", "mpt", "llama", "gpt_gqa_relu2", "bert", "moe_mla")
ENCODERS = ("bert", "encoder", "electra")
DECODERS = ("gpt", "llama", "opt", "bloom", "falcon", "neox", "pythia", "mistral", "mixtral", "qwen", "gemma", "yi",
            "phi", "palm", "mpt", "glm", "olmo", "grok", "dbrx", "nemotron", "granite", "deepseek", "moe", "megatron",
            "decoder", "dense", "transformer")  # fmt: skip
# Families whose MLPs are gated, where the row does not say; so are nearly all published experts.
GATED = ("llama", "mistral", "mixtral", "qwen", "gemma", "yi", "deepseek", "moe", "grok", "dbrx", "olmo", "granite",
         "glm", "palm")  # fmt: skip
# Words for attention by one kernel, and for products with a softmax between them; the latter are looked for first.
FUSED = re.compile(
    r"flash|fused|cudnn|sdpa|scaled.dot|xformers|mem(ory)?[- _]?eff|transformer[- _]?engine|\bte\b|\bfa[- ]?\d?\b"
    r"|triton|splash|pallas|\bflex|aiter|\bck\b|^(true|yes|on|1)$"
)
UNFUSED = re.compile(
    r"\bun-?fused|\b(no|not|non|without|w/o)[- ]+(flash|fused|te\b|fa\d?\b)|^(eager|none|no|off|false|0|core|plain|"
    r"standard|vanilla|manual|softmax)\b|eager attention|\bmath\b|naive|\bbmm\b"
)
# Models whose public configuration (config.json on its model page) ties embedding and logits, or does not, against the
# habit of its family, and whose heads are not hidden / heads wide.
TIED = re.compile(
    r"llama[- ]?3\.2[- ]?[13]b|qwen[- ]?2\.5[- ]?(0\.5|1\.5|3)b|qwen[- ]?2[- ]?(0\.5|1\.5)b"
    r"|qwen[- ]?3[- ]?(0\.6|1\.7|4)b|gemma|smollm"
)
UNTIED = re.compile(r"pythia|neox|gpt[- ]?j\b")
WIDE_HEADS = (
    (r"qwen[- ]?3", 128), (r"gemma[- ]?2[- ]?27b|gemma[- ]?3[- ]?27b", 128), (r"gemma", 256),
    (r"mistral[- ]?nemo", 128), (r"gpt[- ]?oss", 64),
)  # fmt: skip
SDPA_SINCE = (4, 36)  # of transformers: models with a class for it use torch's fused attention (its pull request 26572)


def family_named(case: Case) -> str:
    """The word for a row's family: the name of its model where the column says nothing."""
    return case.word("family") or case.word("model")


def family_of(case: Case) -> str:
    """The family of the schema that a row's model is built as; other names count as what their layers are like."""
    family = re.sub(r"[^a-z0-9]", "", family_named(case))
    if found := next((known for known in FAMILIES if known.replace("_", "") == family), None):
        return found
    if "mla" in family or "deepseekv" in family:
        return "moe_mla"
    if any(word in family for word in ENCODERS):
        return "bert"
    if any(word in family for word in DECODERS):
        return "llama" if is_gated(case) else "gpt"
    raise CaseError(
        f"family {family_named(case)!r} is none of {', '.join(FAMILIES)}; the columns do not tell what its layers are"
    )


def is_gated(case: Case) -> bool:
    """Whether MLPs, of experts and others, are gated: as the row says, else as models of its family have them."""
    usual = case.whole("moe_experts", 0) > 0 or any(word in family_named(case) for word in GATED)
    return case.flag("gated_mlp", usual)


def kv_heads_of(case: Case) -> int:
    """Heads of keys and values of the model that is built: replicated where there are fewer than tensor-parallel ranks,
    as Megatron-LM and Transformer Engine do."""
    heads, tp = case.whole("heads", least=1), case.degree("tp")
    kv_heads = case.whole("kv_heads", heads) or heads
    if heads % kv_heads:
        raise CaseError(f"heads {heads} and kv_heads {kv_heads} must divide one by the other")
    if heads % tp or max(kv_heads, tp) % min(kv_heads, tp):
        raise CaseError(
            f"heads {heads} and kv_heads {kv_heads} do not divide among tp = {tp} ranks; each rank has whole heads, "
            "and equally many"
        )
    return max(kv_heads, tp)


def attention_named(case: Case) -> bool | None:
    """Whether a row's words stand for attention by one kernel; None where they do not tell."""
    kernel = case.word("attention")
    if UNFUSED.search(kernel):
        return False
    return True if FUSED.search(kernel) else None


def fused_attention(case: Case) -> bool:
    """Whether one kernel computes attention: what the row says; where it does not tell, what its trainer does by
    default (torch's `scaled_dot_product_attention` and Transformer Engine are fused, older programs are not)."""
    if case.degree("cp") > 1:  # rings of keys and values run with fused kernels alone
        return True
    if (said := attention_named(case)) is not None:
        return said
    if re.search(r"hugging ?face|\btransformers\b", case.word("software")):
        dated = re.search(r"\b20(1\d|2[0-3])\b|torch[ =(v-]*1\.", case.word("software"))
        return not dated and transformers_version(case) >= SDPA_SINCE
    old = ("megatron-deepspeed", "2022", "pytorch 1.", "tensorflow", "oneflow", "2021", "2020")
    return not any(word in case.word("software") for word in old)


def transformers_version(case: Case) -> tuple[int, int]:
    """The version of Hugging Face's transformers that a row names; the latest where it names none."""
    named = re.search(r"(?:hugging ?face|transformers)[ =(v-]*([2-9])\.(\d+)", case.word("software"))
    return (int(named[1]), int(named[2])) if named else (99, 0)


def is_tied(case: Case, family: str) -> bool:
    """Whether embedding and logits share their weights: what the notes say, what the model's public configuration
    says, else as in the first models of its family."""
    notes, name = case.text("notes").lower(), case.word("model")
    if re.search(r"\bun-?tied?\b|\bnot tied|tie\w*_embeddings\s*[=:]?\s*false", notes):
        return False
    if re.search(r"\btied\b|tie\w*_embeddings\s*[=:]?\s*true", notes):
        return True
    if UNTIED.search(name):
        return False
    return family in ("gpt", "mpt", "bert") or bool(TIED.search(name))


def head_width_of(case: Case, hidden: int, heads: int) -> int:
    """Numbers of a head: those of the column head_dim or of the notes, of the model's public configuration, else an
    equal part of the hidden size. CaseError where that is no whole number."""
    if case.whole("head_dim", 0):
        return case.whole("head_dim")
    if said := re.search(r"(?:head[_ -]?(?:dim(?:ension)?|width|size)|kv[_ -]?channels)\s*(?:of|=|:)?\s*(\d+)",
                         case.text("notes").lower()):  # fmt: skip
        return int(said[1])
    if known := next((width for words, width in WIDE_HEADS if re.search(words, case.word("model"))), 0):
        return known
    if hidden % heads:
        raise CaseError(
            f"hidden {hidden} and heads {heads} must divide one by the other; else head_dim must say how wide a head is"
        )
    return hidden // heads


def activation_of(case: Case) -> Any:
    """What stands between the products of an MLP. Hugging Face's GPT-2 spells GELU out ("gelu_new", the default of its
    configuration and the value in NeuSight's); its OPT has one kernel (ReLU), and Megatron's layers have their own."""
    name, family = case.text("software").lower(), family_of(case)
    if is_gated(case):
        return "swiglu"
    if family == "gpt_gqa_relu2":
        return "relu2"
    spelled = family == "gpt" and "hugging face" in name and "megatron" not in name
    return "gelu_new" if spelled and case.text("model").lower().startswith("gpt") else "gelu"
