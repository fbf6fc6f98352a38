"""Trains a Bayesian language model by the ELBO with the Trainer of Hugging Face, and resumes where it was stopped.

    torchrun --nproc_per_node=2 examples/hf_trainer.py --checkpoint trainer

The text are handwritten digits, pixel by pixel; there are 17 shades. Input and output embeddings are tied, gradients
are accumulated, and activations are checkpointed.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

import bnnify
from bnnify.cli.demo import load_digits


class ELBOTrainer(transformers.Trainer):
    loss_is_scaled_for_ga = False  # the loss is the mean over a batch; where it accumulates, the Trainer averages

    def __init__(self, *args, num_data: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.num_data = num_data

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output, kl = model(**inputs)
        loss = bnnify.elbo(output.loss, kl, num_data=self.num_data)
        return (loss, output) if return_outputs else loss

    def _save(self, output_dir=None, state_dict=None):
        # Tied weights, which safetensors takes only as tensors of their own; the Trainer sees to that in models of
        # transformers alone.
        copies = {name: value.to("cpu", copy=True) for name, value in (state_dict or self.model.state_dict()).items()}
        super()._save(output_dir, copies)


def main() -> None:
    options = _options()
    arguments = transformers.TrainingArguments(
        str(options.checkpoint),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=10,
        gradient_accumulation_steps=options.accumulate,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not torch.cuda.is_available(),
        bf16=options.bfloat16,
        max_grad_norm=10.0,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        remove_unused_columns=False,  # it would go by the signature of `forward`, which takes any
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )
    transformers.set_seed(0)  # as the Trainer does, on all processes alike: they draw different networks all the same
    _, train, test = load_digits()
    rows, unseen = ((16 * digits.images).round().long().flatten(1) for digits in (train, test))
    sizes = {"vocab_size": 17, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    bnn = bnnify.convert(transformers.GPT2LMHeadModel(config))

    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=3e-3, rho_lr=1e-2))
    trainer = ELBOTrainer(
        bnn,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizers=(optimizer, None),
        num_data=rows[:, 1:].numel(),  # the predicted tokens of the whole training set, all processes together
    )
    trainer.train(resume_from_checkpoint=any(options.checkpoint.glob("checkpoint-*")))

    if trainer.is_world_process_zero():
        batches = ({"input_ids": rows.to(arguments.device)} for rows in unseen.split(100))
        probabilities = bnn.predict(batches, 8, likelihood="logits", output="logits", class_dim=-1).mean.cpu()
        nll = F.nll_loss(probabilities[:, :-1].flatten(0, 1).log(), unseen[:, 1:].flatten())
        print(f"NLL per pixel of {len(unseen)} test digits: {nll:.3f}")
        bnnify.save(bnn, options.checkpoint / "model.bnn.pt")
    trainer.accelerator.wait_for_everyone()  # no process leaves while another still needs it
    trainer.accelerator.end_training()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder where to stop and resume")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--accumulate", type=int, default=2, help="batches to a step; default: 2")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where autocast thinks it safe")
    return parser.parse_args()


if __name__ == "__main__":
    main()
