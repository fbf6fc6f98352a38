"""
Language model
==============

A tiny language model learns sentences by their letters. Converted, it tells for each
letter how unsure it was, and how much of that is its own doubt. With a model of a real
size only ``from_pretrained`` differs; what to do with adapters is on the page about
:doc:`language models </language-models>`.
"""

import matplotlib.pyplot as plt
import torch
import transformers

import bnnify

# %%
# Sentences
# ---------
# "The cat sees the dog." and the like: the model can know each letter but those that
# choose a word. It sees 20 of them, too few to know which words go together.

torch.manual_seed(0)
transformers.set_seed(0)
ANIMALS, VERBS = ["cat", "dog", "cow", "hen", "fox"], ["sees", "hears", "meets"]
LETTERS = sorted(set("the .z" + "".join(ANIMALS + VERBS)))


def sentences(number):
    subjects, verbs, objects = (
        torch.randint(len(words), (number,)) for words in (ANIMALS, VERBS, ANIMALS)
    )
    return [
        f"the {ANIMALS[a]} {VERBS[b]} the {ANIMALS[c]}.".ljust(24)
        for a, b, c in zip(subjects, verbs, objects, strict=True)
    ]


def encode(texts):
    return torch.tensor([[LETTERS.index(letter) for letter in text] for text in texts])


train_ids = encode(sentences(20))

# %%
# The model
# ---------
# A Llama of 2 layers with random weights, trained as always: the loss is that of the
# next letter.

config = transformers.LlamaConfig(
    vocab_size=len(LETTERS),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    bos_token_id=None,
    eos_token_id=LETTERS.index("."),
    pad_token_id=LETTERS.index(" "),
)
model = transformers.LlamaForCausalLM(config)
nll = bnnify.CategoricalNLL()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(150):
    for ids in train_ids[torch.randperm(len(train_ids))].split(20):
        optimizer.zero_grad()
        nll(model(input_ids=ids).logits[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
model.eval()

# %%
# Convert, and fit the noise
# --------------------------
# Other sentences say how much noise the weights bear. ``output`` takes the logits out
# of what the model returns; here also without those of the last letter, for which there
# is no next one. The datum is a letter.


def logits(output):
    return output.logits[:, :-1]


bnn = bnnify.convert(model)
held_out = encode(sentences(64))
tuned = bnnify.tune_std(
    bnn,
    [({"input_ids": held_out}, held_out[:, 1:])],
    likelihood="logits",
    output=logits,
    num_samples=8,
)
print(tuned)

# %%
# Letter by letter
# ----------------
# One sentence as in the training, and one with a word that the model has never seen.

texts = ["the cat sees the dog.".ljust(24), "the cat sees the zzz.".ljust(24)]
ids = encode(texts)
prediction = bnn.predict(
    {"input_ids": ids}, num_samples=32, likelihood="logits", output=logits
)
figure, places = plt.subplots(2, 1, figsize=(7, 4.2), sharey=True, layout="constrained")
for axes, text, entropy, doubt in zip(
    places,
    texts,
    prediction.predictive_entropy,
    prediction.mutual_information,
    strict=True,
):
    places_of_letters = range(1, len(text))
    axes.bar(places_of_letters, entropy, color="C0", label="entropy")
    axes.bar(places_of_letters, doubt, color="C1", label="of it mutual information")
    axes.set_xticks(places_of_letters, text[1:])
    axes.set_ylabel("nats")
places[0].legend(loc="upper right", fontsize="small")

# %%
# A whole text from one network, its cache included:

with bnn.draw():
    start = ids[:1, :4]
    written = bnn.module.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=18,
        do_sample=False,
    )
print("".join(LETTERS[number] for number in written[0]))

plt.show()
