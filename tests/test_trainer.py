"""The Trainer of Hugging Face asks a converted model what it asks any model of transformers."""

import pytest
import torch

import bnnify

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class ELBOTrainer(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output, kl = model(**inputs)
        nll = self.label_smoother(output, inputs["labels"], shift_labels=True) if self.label_smoother else output.loss
        loss = bnnify.elbo(nll, kl, num_data=96)
        return (loss, output) if return_outputs else loss


class SavingTrainer(ELBOTrainer):
    """Gives safetensors, which takes no tensor twice, copies of tied ones, as our example does."""

    def _save(self, output_dir=None, state_dict=None):
        given = state_dict or self.model.state_dict()
        super()._save(output_dir, {name: tensor.clone() for name, tensor in given.items()})


def test_a_model_with_tied_weights_resumes_from_a_checkpoint_of_the_trainer(tmp_path):
    def trained(trainer_class, folder, **options):
        torch.manual_seed(0)
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 6}
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
        bnn = bnnify.convert(transformers.GPT2LMHeadModel(config))
        assert bnn.module.lm_head.weight_rho is bnn.module.transformer.wte.weight_rho
        rows = torch.randint(1, 11, (16, 6))
        arguments = transformers.TrainingArguments(
            str(folder),
            max_steps=4,
            save_steps=2,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = trainer_class(bnn, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
        trainer.train(**options)
        return bnn

    with pytest.raises(RuntimeError, match="share memory"):  # of safetensors, at the first checkpoint
        trained(ELBOTrainer, tmp_path / "none")
    whole = trained(SavingTrainer, tmp_path / "whole")
    resumed = trained(
        SavingTrainer, tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed.module.lm_head.weight is resumed.module.transformer.wte.weight


@pytest.mark.filterwarnings("error:.*only defines")  # a name that the Trainer asks for and the model lacks
@pytest.mark.parametrize("option", [{}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}], ids=str)
def test_training_evaluation_and_prediction_run_with_what_the_trainer_can_do(option, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bnn = bnnify.convert(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=11)))
    rows = torch.randint(1, 11, (16, 6))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **option,
    )
    trainer = ELBOTrainer(bnn, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert bnn.module.is_gradient_checkpointing == ("gradient_checkpointing" in option)
    assert trainer.evaluate()["eval_loss"] > 0
    predictions = trainer.predict(data).predictions  # logits, and the cache of keys and values
    assert (predictions[0] if isinstance(predictions, tuple) else predictions).shape == (16, 6, 11)


def test_a_converted_model_without_a_config_says_so():
    with pytest.raises(AttributeError, match="'BayesianLinear' object has no attribute 'config'"):
        _ = bnnify.convert(torch.nn.Linear(2, 2)).config
