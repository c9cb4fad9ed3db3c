"""What public_scripts.py gives scripts to read: pictures of noise, and models of two layers with tokenizers of a few words."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = (
    "no one tweets @ # about a photo of the sks dog cat red blue green thing this is good bad label complaint text "
    ": . ? ' s"
)


def make_images(place: Path) -> None:
    import numpy
    from PIL import Image

    draw = numpy.random.default_rng(0)
    for folder in ("images", "captioned"):
        (place / folder).mkdir()
    captions = []
    for index in range(16):
        image = Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=numpy.uint8))
        for folder in ("images", "captioned"):
            image.save(place / folder / f"{index:02}.png")
        captions.append(
            json.dumps({"file_name": f"{index:02}.png", "text": f"a photo of the {WORDS.split()[index]} dog"})
        )
    (place / "captioned" / "metadata.jsonl").write_text("\n".join(captions))


def make_language(place: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS.split(), "Tweet", "text", "Label"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    llama = LlamaForCausalLM(
        LlamaConfig(**small, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    bert = BertForSequenceClassification(BertConfig(**small, max_position_embeddings=128, pad_token_id=0))
    for name, model in (("language", llama), ("classifier", bert)):
        model.save_pretrained(place / name)
        fast.save_pretrained(place / name)


def make_diffusion(place: Path) -> None:
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "do",
        "dog</w>",
    ]
    (place / "words").mkdir()
    (place / "words" / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (place / "words" / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\n")
    tokenizer = CLIPTokenizer(
        str(place / "words" / "vocab.json"),
        str(place / "words" / "merges.txt"),
        model_max_length=16,
        pad_token="<|endoftext|>",
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer) + 64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    small = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **small,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **small,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(num_train_timesteps=50),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(place / "diffusion")
    UNet2DModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **small,
    ).save_config(place / "unet")
