# %% [markdown]
# # Teach a vision-language model to read digits by GRPO
#
# Your rows, your reward, a model, a trainer: from a dataset to a model that you can talk to. All of it runs on a CPU in
# a minute or two and downloads nothing, because the model is a tiny Qwen2.5-VL that is built on the spot. For a real
# model on a 24 GB card, change the lines after **real model**.
#
# ```sh
# pip install "vlm-grpo[demo]"
# python examples/digits.py        # or run the cells of digits.ipynb
# ```

# %%
import os
from pathlib import Path

from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits

from vlm_grpo import LoraOptions, VLMGRPOConfig, VLMGRPOTrainer, VLMSFTConfig, VLMSFTTrainer, load_model
from vlm_grpo.chat import chat
from vlm_grpo.demo import DIGITS, QUESTION, save_tiny_model
from vlm_grpo.evaluate import evaluate

STEPS = int(os.environ.get("VLM_GRPO_EXAMPLE_STEPS", "60"))
SEED = 0
FOLDER = Path("runs/digits-example")

# %% [markdown]
# ## Rows
#
# A row is a prompt, its picture (a PIL image, a path or bytes; several under `images`), and whatever columns the reward
# needs. These are 1,797 real scans of handwriting. 100 of them keep their label for a short supervised start, 450 are
# held out, and of the others only the reward knows the answer.

# %%
scans, labels = load_digits(return_X_y=True)


def to_row(scan, label):
    pixels = (scan.reshape(8, 8) * 15.9).astype("uint8")
    picture = Image.fromarray(pixels).resize((56, 56), Image.Resampling.BILINEAR)
    # The picture is placed in front of the text. {"type": "image"} parts in a list of parts place it elsewhere.
    return {"prompt": [{"role": "user", "content": QUESTION}], "image": picture, "answer": DIGITS[label]}


rows = Dataset.from_list([to_row(*pair) for pair in zip(scans, labels, strict=True)]).shuffle(seed=SEED)
labelled, train, held_out = (rows.select(range(*part)) for part in ((0, 100), (100, 1347), (1347, 1797)))
print(train[0])

# %% [markdown]
# ## A reward
#
# One number for each completion, higher is better; the rows' columns arrive by name. GRPO samples several completions
# of each prompt, and makes those that score above the mean of their group more likely.


# %%
def is_right(completions, answer, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [float(text.strip() == word) for text, word in zip(texts, answer, strict=True)]


# %% [markdown]
# ## A model that sometimes gets it right
#
# GRPO strengthens what a model already does now and then. Published models mostly can; the tiny one has random weights,
# so it first learns a little from the 100 labels. **real model**: leave this cell out.

# %%
save_tiny_model(FOLDER / "tiny", SEED)
model, processor = load_model(FOLDER / "tiny")
start = VLMSFTTrainer(
    model,
    VLMSFTConfig(
        output_dir=str(FOLDER / "start"),
        completion_column="answer",
        max_steps=STEPS // 2,
        per_device_train_batch_size=48,
        learning_rate=1e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=SEED,
    ),
    labelled,
    processing_class=processor,
)
start.train()
start.save_model()

# %% [markdown]
# ## GRPO
#
# **real model**: `load_model("Qwen/Qwen2.5-VL-3B-Instruct", load_in_4bit=True, lora=LoraOptions(r=16))`, and below
# `per_device_train_batch_size=8` (one group), `gradient_accumulation_steps=4`, `max_completion_length=256` and
# `learning_rate=1e-5`.

# %%
model, processor = load_model(FOLDER / "start", lora=LoraOptions(r=32, alpha=32, vision=True))
before = evaluate(model, processor, held_out, score=is_right, max_new_tokens=2)
trainer = VLMGRPOTrainer(
    model,
    is_right,
    VLMGRPOConfig(
        output_dir=str(FOLDER / "grpo"),
        max_steps=STEPS,
        num_generations=8,
        per_device_train_batch_size=256,  # completions: 32 prompts, 8 of each
        max_completion_length=2,  # tokens: a word, and the end of the turn
        learning_rate=5e-3,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=SEED,
    ),
    train,
    processing_class=processor,
)
trainer.train()

# %% [markdown]
# ## Did it learn, and from the pictures?
#
# Rows that were never trained on, answered greedily, with a 95% interval. The last line is the control: with every
# picture black, the model should be about as good as a guess.

# %%
after = evaluate(model, processor, held_out, score=is_right, max_new_tokens=2)
control = evaluate(model, processor, held_out, score=is_right, max_new_tokens=2, blank=True)
for name, result in (("before", before), ("after", after), ("after, black pictures", control)):
    low, high = result.ci95
    print(f"{name:22}{result.accuracy:6.1%}  [{low:.1%}, {high:.1%}]")

# %% [markdown]
# ## Save it, load it again, talk to it
#
# The folder holds the adapter and the processor, and `load_model` takes it like any other model. In a terminal:
# `vlm-grpo chat runs/digits-example/grpo --image runs/digits-example/digit.png --prompt "which digit is this ?"`

# %%
trainer.save_model()
held_out[0]["image"].save(FOLDER / "digit.png")
reply = chat(str(FOLDER / "grpo"), images=[str(FOLDER / "digit.png")], prompt=QUESTION, max_new_tokens=2)
print(f"right: {held_out[0]['answer']}")
