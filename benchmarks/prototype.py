"""What the sweep benchmarks train: a small MGM and pictures, made here, so large that work outweighs start-up.

8.1 million parameters: a Gemma of 4 layers of 256 with 4,096 words, CLIP of 4 layers of 192 (64 visual tokens),
ConvNeXt of 24 to 192 channels at 256 pixels. 96 JPEG files of 640 x 480 with conversations of one to four rounds. All
numbers are drawn from seeds. The LLM is taught the form of the conversations for some steps, so that trials score
differently; the towers have learnt nothing. What a sweep finds here says nothing about models, only the
time that it takes and whether two ways of running it give the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGES, ASKED = 96, 32
TAUGHT = 40
VOCABULARY = 4096
COLOURS = {"red": (200, 40, 40), "blue": (40, 60, 200), "green": (40, 170, 60), "yellow": (230, 210, 50)}
KINDS = ("circle", "square", "triangle")
# Rounds about one picture: the conversations differ in length as real ones do.
MOST_ROUNDS = 4


@dataclass(frozen=True)
class Prototype:
    """Where the model and the data lie.

    Args:
        model: Folder of the model.
        rows: Conversations in LLaVA's form.
        asked: Held-out questions, one JSON object a line.
        images: What the paths in both are relative to.
    """

    model: Path
    rows: Path
    asked: Path
    images: Path

    def overrides(self) -> list[str]:
        """What a command of ours needs to train on it, as the official recipe does but for the align stage."""
        return [
            f"model.path={self.model}",
            f"data.path={self.rows}",
            f"data.image_root={self.images}",
            "device=cpu",
            "eval=custom",
            f"eval.custom.questions={self.asked}",
            f"eval.custom.images={self.images}",
            "eval.custom.instruction=null",
            "eval.custom.max_new_tokens=2",
            "tracker=disabled",
            "train.align.max_steps=0",
        ]


def make_prototype(folder: Path, *, images: int = IMAGES, asked: int = ASKED, taught: int = TAUGHT) -> Prototype:
    """Writes model, pictures and rows; ``taught``: steps of the LLM."""
    made = Prototype(folder / "model", folder / "rows.json", folder / "asked.jsonl", folder / "images")
    made.images.mkdir(parents=True)
    made.model.mkdir(parents=True)
    rows, questions = [], []
    for number in range(images + asked):
        name, colour, kind = f"{number:04d}.jpg", *_picture(made.images / f"{number:04d}.jpg", number)
        if number < images:
            rows.append({"id": f"p{number}", "image": name, "conversations": _conversation(number, colour, kind)})
        else:
            asks = {"question_id": f"q{number}", "image": name, "question": "what colour is the shape ?"}
            questions.append({**asks, "answer": colour})
    made.rows.write_text(json.dumps(rows), encoding="utf-8")
    made.asked.write_text("".join(json.dumps(line) + "\n" for line in questions), encoding="utf-8")
    write_model(made.model)
    if taught:
        _teach(made, taught)
    return made


def model_config(vocabulary: int = VOCABULARY) -> Any:
    """``MGMConfig`` of the prototype."""
    from mgm_exp.train.tiny.base_config import small_config

    return small_config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        head_dim=64,
        image_size_aux=256,
        mm_hidden_size=192,
        mm_hidden_size_aux=360,
        mm_vision_tower="prototype-clip",
        mm_vision_tower_aux="prototype-convnext",
        vision_config={
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "projection_dim": 64,
            "hidden_act": "quick_gelu",
        },
        vision_aux_config={"dims": [24, 48, 96, 192], "depths": [2, 2, 4, 2], "layer_scale_init": 0.5},
    )


def write_model(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """The model with drawn weights, in fp32, with the tiny base's tokenizer (the other words never occur)."""
    import torch
    from safetensors.torch import save_file

    from mgm_exp.model.mgm import new_model
    from mgm_exp.train.tiny.tokenizer import make_tokenizer, save_tokenizer

    config = model_config(vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(config)
    tensors = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }  # tied, as in official files
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = {**config.to_dict(), "architectures": ["MGMGemmaForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    save_tokenizer(make_tokenizer(), folder)


def _teach(made: Prototype, steps: int, batch: int = 8) -> None:
    """Trains all of the LLM on the conversations, with the pictures as the untaught connector shows them."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file

    from mgm_exp.data import collate
    from mgm_exp.model import load_model, load_processor

    model, processor = load_model(made.model, dtype="float32"), load_processor(made.model)
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    rows = json.loads(made.rows.read_text(encoding="utf-8"))
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        examples = []
        for number in torch.randint(len(rows), (batch,), generator=draw).tolist():
            row = rows[number]
            encoded = processor.encode(row["conversations"][:2])
            low, high = processor.pixels(Image.open(made.images / row["image"]), "pad")
            example = {key: torch.tensor(value) for key, value in encoded.items()}
            examples.append({**example, "image": low, "image_aux": high, "id": row["id"]})
        model.loss(collate(examples, processor.pad_token_id)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = load_file(made.model / "model.safetensors")
    learnt = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert learnt.keys() <= tensors.keys()
    save_file({**tensors, **learnt}, made.model / "model.safetensors", metadata={"format": "pt"})


def _picture(path: Path, number: int) -> tuple[str, str]:
    """A noisy ground with one large shape, as large as a photo to decode: its colour and kind."""
    import numpy as np
    from PIL import Image, ImageDraw

    draw = np.random.default_rng(number)
    ground = draw.integers(60, 190, (30, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(ground).resize((640, 480), Image.Resampling.BICUBIC)
    colour = list(COLOURS)[int(draw.choice(4, p=(0.4, 0.3, 0.2, 0.1)))]
    kind = KINDS[int(draw.integers(3))]
    x, y, size = (int(draw.integers(*span)) for span in ((20, 250), (20, 150), (200, 320)))
    pen = ImageDraw.Draw(picture)
    if kind == "circle":
        pen.ellipse((x, y, x + size, y + size), fill=COLOURS[colour])
    elif kind == "square":
        pen.rectangle((x, y, x + size, y + size), fill=COLOURS[colour])
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLOURS[colour])
    grain = draw.normal(0, 6, (480, 640, 3))
    Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)).save(path, quality=90)
    return colour, kind


def _conversation(number: int, colour: str, kind: str) -> list[dict[str, str]]:
    rounds = [
        ("<image>\nwhat colour is the shape ?", colour),
        ("what is the object ?", f"a {kind}"),
        ("describe the picture .", f"the picture shows a {colour} {kind} and there is text in it"),
        ("how many objects are there in the picture ?", "there is one object"),
        ("is there any text in the picture , and what is written on the label ?", "there is no text on it"),
    ]
    turns = []
    for question, answer in rounds[: 1 + number % MOST_ROUNDS]:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns
