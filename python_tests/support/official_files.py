"""Checkpoints in the reference project's two formats, made from its key grammar."""

import torch


def soup_state(stem, hidden, width, down, up, seed=0):
    """One ExpertSoup's keys below `stem`: down and up are the experts of each side."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    state = {}
    for side, count, rows, columns in (("MoA_A", down, width, hidden), ("MoA_B", up, hidden, width)):
        state[f"{stem}.{side}.expert_score_weight"] = random(count)
        for m in range(count):
            state[f"{stem}.{side}.deepspeed_experts.{m}.weight"] = random(rows, columns)
            state[f"{stem}.{side}.deepspeed_experts.{m}.bias"] = random(rows)
    return state


def nlu_state(family, layers, hidden, width, down=4, up=1, labels=2):
    """The flat file of BERT or RoBERTa with its classifier."""
    state = {}
    for i in range(layers):
        state |= soup_state(f"{family}.encoder.layer.{i}.output.ExpertSoup", hidden, width, down, up, seed=i)
    heads = {"bert": {"classifier": labels}, "roberta": {"classifier.dense": hidden, "classifier.out_proj": labels}}
    for name, rows in heads[family].items():
        state |= {f"{name}.weight": torch.randn(rows, hidden), f"{name}.bias": torch.randn(rows)}
    return state


def lora_state(stem, hidden, r, down, up, seed=0):
    """One AdamixMergedLinear's own keys below `stem` (q and v of c_attn), without its weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    state = {f"{stem}.lora_expert_score_weight": torch.randn(max(down, up), generator=generator)}
    for m in range(down):
        state[f"{stem}.experts_lora_A.{m}"] = torch.randn(2 * r, hidden, generator=generator) * 0.1
    for m in range(up):
        state[f"{stem}.experts_lora_B.{m}"] = torch.randn(2 * hidden, r, generator=generator) * 0.1
    return state


def nlg_lora_state(layers, hidden, r, down=4, up=1, base=None):
    """The wrapped file of GPT-2 with LoRA; base: a model whose c_attn weights it repeats."""
    state = {}
    for i in range(layers):
        stem = f"module.transformer.h.{i}.attn.c_attn"
        if base is not None:
            layer = base.transformer.h[i].attn.c_attn
            state |= {f"{stem}.weight": layer.weight.detach().clone(), f"{stem}.bias": layer.bias.detach().clone()}
        state |= lora_state(stem, hidden, r, down, up, seed=i)
        state[f"{stem}.lora_B_w"] = torch.zeros(2 * hidden, r)
    return {"model_state_dict": state}


def nlg_soup_state(layers, hidden, width, down=4, up=1):
    """The wrapped file of GPT-2 with adapters, as saved during training."""
    state = {}
    for i in range(layers):
        state |= soup_state(f"module.transformer.h.{i}.mlp.ExpertSoup", hidden, width, down, up, seed=i)
    return {"model_state_dict": state}


def full_gpt2_state(model, added):
    """The reference project's final file: every weight of its own GPT-2 besides what AdaMix added."""
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("lm_head.weight", "lm_head.decoder.weight")
        state[f"module.{key}"] = value.clone()
    for i in range(model.config.n_layer):
        state[f"module.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40)
    return {"model_state_dict": {**state, **added["model_state_dict"]}}
