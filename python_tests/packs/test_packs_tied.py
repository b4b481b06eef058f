"""A head that is trained whole and tied to the embedding: one a name is another model than was trained. Refused."""

import pytest
import tiny
import tiny_packs as tp
import torch

from adamix_kernels import (
    AdaMixConfig,
    PackJob,
    PackTrainer,
    adapt,
    add_expert,
    load_adamix,
    load_pack,
    pack,
    save_adamix,
    save_pack,
    unpack,
)

SAID = r"^a: lm_head: got a module trained whole that is tied to model.embed_tokens.weight, expected .*with LoRA"


def llama(tie=True):
    return tiny.tiny_llama(tie_word_embeddings=tie)


def config(**options):
    return AdaMixConfig(method="lora", num_experts=2, r=2, **options)


def saved(folder, tie=True):
    model = tp.randomise(adapt(llama(tie), config(modules_to_save=["lm_head"])), 3).eval()
    with torch.no_grad():
        return save_adamix(model, folder), model(**tp.inputs(model)).logits


def test_a_pack_refuses_it_and_takes_an_untied_one(tmp_path):
    folder, _ = saved(tmp_path / "tied")
    embedding = save_adamix(adapt(llama(), config(modules_to_save=["embed_tokens"])), tmp_path / "embedding")
    model = llama()
    before = tp.state_of(model)
    with pytest.raises(ValueError, match=SAID):
        pack(model, {"a": folder})
    tp.same_state(before, tp.state_of(model))
    with pytest.raises(ValueError, match=r"model.embed_tokens: got a Embedding among the modules trained whole"):
        pack(model, {"a": embedding})
    tp.same_state(before, tp.state_of(model))
    other, want = saved(tmp_path / "own", False)
    packed = pack(llama(False), {"a": other})
    torch.testing.assert_close(tp.logits(packed, "a", tp.inputs(packed)), want, **tp.CLOSE)


def test_a_trainer_refuses_it_and_trains_a_lora_of_it():
    model = llama()
    before = tp.state_of(model)
    with pytest.raises(ValueError, match=SAID):
        PackTrainer(model, {"a": PackJob(config(modules_to_save=["lm_head"]))})
    tp.same_state(before, tp.state_of(model))
    trainer = PackTrainer(model, {"b": PackJob(config(target_modules=["lm_head"]))}, capacity=2)
    with pytest.raises(ValueError, match=SAID):
        trainer.add("a", PackJob(config(modules_to_save=["lm_head"])))


def test_peft_s_copy_of_it_is_served_and_is_no_checkpoint_alone(tmp_path):
    pytest.importorskip("peft")
    wrapped = tp.peft_saved(tmp_path / "peft", llama(), 1, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    packed = pack(llama(), {"peft": tmp_path / "peft"}, capacity=2)
    batch = tp.inputs(packed)
    with torch.no_grad():
        want = wrapped(**batch).logits
    for one in (packed, load_pack(llama(), save_pack(packed, tmp_path / "pack"))):
        torch.testing.assert_close(tp.logits(one, "peft", batch), want, **tp.CLOSE)
        with pytest.raises(ValueError, match=SAID):
            add_expert(one, "a", saved(tmp_path / "tied")[0])
        with pytest.raises(ValueError, match=SAID.replace("a: ", "")):
            unpack(one, "peft", tmp_path / "alone")
        assert not (tmp_path / "alone").exists()


def test_a_job_of_a_lora_of_it_is_what_load_adamix_and_a_pack_read(tmp_path):
    trainer = PackTrainer(llama(), {"a": PackJob(config(target_modules=["q_proj", "lm_head"]), lr=5e-2)})
    for seed in range(3):
        trainer.step(tiny.batch_for(trainer.model, seed=seed), ["a"] * 4)
    with trainer.alone("a") as model, torch.no_grad():
        want = model.eval()(**tp.inputs(model)).logits
    folder = trainer.finish("a", tmp_path)
    loaded, packed = load_adamix(llama(), folder).eval(), pack(llama(), {"a": folder})
    with torch.no_grad():
        torch.testing.assert_close(loaded(**tp.inputs(loaded)).logits, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tp.logits(packed, "a", tp.inputs(packed)), want, rtol=1e-4, atol=1e-4)
