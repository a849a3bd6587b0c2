"""What takes the place of parts that diffusers' tests fetch from the hub.

`patch_hub` lets ``from_pretrained`` of transformers' classes make a tiny part where it is asked for
one that is not on this machine. Which one says a piece of the name that was asked for.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import transformers as t
from diffusers import UNet2DModel, UNetSpatioTemporalConditionModel
from tokenizers.processors import TemplateProcessing
from torch import nn

import tiny_pipelines as tiny

Part: TypeAlias = Any  # a tokenizer, a processor, a network or a config

# Settings that tests pass to ``from_pretrained``, and that a stand-in takes over.
SETTINGS = ("model_max_length", "hop_length", "size")
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 1103}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_channels": 16,
    "out_hidden_size": 16,
    "patch_size": 14,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 2,
}
MARKS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
IMAGE_MARKS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def letters() -> dict[str, int]:
    """Return a vocabulary of every byte."""
    return {letter: i for i, letter in enumerate(sorted(tiny.ByteLevel.alphabet()))}


def qwen() -> Part:
    """Make a tokenizer of bytes."""
    tokenizer = t.Qwen2Tokenizer(vocab=letters(), merges=[])
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                "<|vision_start|>",
                "<|vision_end|>",
                "<|image_pad|>",
                "<|video_pad|>",
            ]
        }
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def begun(padding_side: str = "right", **marks_of_pictures: str) -> Part:
    """Make a tokenizer of bytes that begins each text with a mark, and so has no empty one."""
    plain = qwen()
    backend = plain.backend_tokenizer
    marks = [("<|endoftext|>", backend.token_to_id("<|endoftext|>"))]
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=marks)
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        padding_side=padding_side,
        extra_special_tokens=marks_of_pictures,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def roberta() -> Part:
    """Make a tokenizer of bytes with marks at both ends of a text."""
    vocabulary = dict(zip(MARKS, range(len(MARKS)), strict=True))
    vocabulary |= {letter: i + len(MARKS) for letter, i in letters().items()}
    return t.RobertaTokenizer(vocab=vocabulary, merges=[])


def xlm_roberta() -> Part:
    """Make a unigram tokenizer of words and letters."""
    vocabulary = [*((mark, 0.0) for mark in MARKS), ("▁", -2.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in tiny.WORDS]
    vocabulary += [(letter, -6.0) for letter in tiny.LETTERS]
    return t.XLMRobertaTokenizer(vocab=vocabulary, model_max_length=tiny.CLIP_LENGTH)


def chatglm() -> Part:
    """Make a tokenizer of Kolors from words; it needs the package sentencepiece."""
    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    prefix = Path.cwd() / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*tiny.WORDS, *tiny.LETTERS] * 9),
        model_prefix=str(prefix),
        model_type="char",
        vocab_size=len(tiny.LETTERS) + 20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return ChatGLMTokenizer(vocab_file=str(prefix.with_suffix(".model")))


def chatglm_model() -> Part:
    """Make a text encoder of Kolors."""
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    model = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=1000,
            hidden_size=8,
            ffn_hidden_size=37,
            kv_channels=4,
            num_attention_heads=2,
            multi_query_attention=True,
            multi_query_group_num=1,
            add_qkv_bias=True,
            original_rope=True,
        )
    )
    for parameter in model.parameters():  # some are made without values
        nn.init.normal_(parameter, std=0.02)
    return model


def qwen_processor(kind: str) -> Callable[[], Part]:
    """Return what makes a processor of texts and pictures."""

    def make() -> Part:
        tokenizer = qwen()
        return getattr(t, f"{kind}Processor")(
            image_processor=t.Qwen2VLImageProcessor(),
            tokenizer=tokenizer,
            video_processor=getattr(t, f"{kind}VideoProcessor")(),
            chat_template=tokenizer.chat_template,
        )

    return make


def pixtral_processor() -> Part:
    """Make the processor of texts and pictures of Mistral."""
    tokenizer = begun()
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_MARKS)})
    return t.PixtralProcessor(
        image_processor=t.PixtralImageProcessor(), tokenizer=tokenizer, chat_template=TEMPLATE
    )


def glm_processor() -> Part:
    """Make the processor of texts and pictures of GLM-Image."""
    tokenizer = begun(
        image_token="<|image_pad|>",
        grid_bos_token="<|vision_start|>",
        grid_eos_token="<|vision_end|>",
    )
    return t.GlmImageProcessor(
        image_processor=t.GlmImageImageProcessor(), tokenizer=tokenizer, chat_template=TEMPLATE
    )


def qwen2_vl() -> Part:
    """Make a network of texts and pictures."""
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default"}
    text = {**TEXT, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 16}
    return t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(text_config=text, vision_config=vision)
    )


def qwen3_vl() -> Part:
    """Make a network of texts and pictures."""
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
    text = {**TEXT, "head_dim": 8, "rope_parameters": rope}
    return t.Qwen3VLForConditionalGeneration(
        t.Qwen3VLConfig(text_config=text, vision_config=QWEN_VISION)
    )


def gemma3() -> Part:
    """Make a network of texts and pictures."""
    text = {**TEXT, "hidden_size": 32, "head_dim": 8}
    return t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4)
    )


def bert() -> Part:
    """Make a text encoder."""
    return t.BertModel(
        t.BertConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=1124,
        )
    )


# Each a piece of the name that is asked for, and what makes the part; the last that fits is taken.
TOKENIZERS: list[tuple[str, Callable[[], Part]]] = [
    ("bert", tiny._bert_tokenizer),
    ("roberta", roberta),
    ("mclip", xlm_roberta),
    ("clip", tiny._clip_tokenizer),
    ("t5", tiny._t5_tokenizer),
    ("glm", lambda: begun("left")),
    ("chatglm", chatglm),
    ("qwen", qwen),
    ("cosmos", qwen),
    ("gemma", begun),
    ("llama", begun),
    ("hunyaunvideo", begun),
]


def parts() -> list[tuple[type, str, Callable[[], Part]]]:
    """Return the stand-ins that are not tokenizers: class, a piece of the name, what makes it."""
    kolors: list[tuple[type, str, Callable[[], Part]]] = []
    if find_spec("sentencepiece") is not None:
        from diffusers.pipelines.kolors import ChatGLMModel

        kolors = [(ChatGLMModel, "chatglm", chatglm_model)]
    return [
        *kolors,
        (t.AutoConfig, "t5", lambda: t.T5Config(**T5)),
        (t.T5EncoderModel, "t5", lambda: t.T5EncoderModel(t.T5Config(**T5))),
        (t.UMT5EncoderModel, "umt5", lambda: t.UMT5EncoderModel(t.UMT5Config(**T5))),
        (t.BertModel, "bert", bert),
        (t.LlamaForCausalLM, "llama", lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT))),
        (
            t.SiglipVisionModel,
            "siglip",
            lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SIGLIP)),
        ),
        (t.Gemma3ForConditionalGeneration, "gemma", gemma3),
        (t.Qwen2VLForConditionalGeneration, "qwen2vl", qwen2_vl),
        (t.Qwen3VLForConditionalGeneration, "qwen3vl", qwen3_vl),
        (UNet2DModel, "consistency-models-test", tiny._unconditional_unet),
        (t.AutoProcessor, "qwen", qwen_processor("Qwen2VL")),
        (t.Qwen2VLProcessor, "qwen", qwen_processor("Qwen2VL")),
        (t.Qwen3VLProcessor, "qwen", qwen_processor("Qwen3VL")),
        (t.AutoProcessor, "mistral", pixtral_processor),
        (t.GlmImageProcessor, "glm", glm_processor),
        (t.SiglipImageProcessor, "siglip", t.SiglipImageProcessor),
        (t.DPTImageProcessor, "dpt", t.DPTImageProcessor),
        (t.ClapFeatureExtractor, "clap", t.ClapFeatureExtractor),
    ]


def patch_hub() -> None:
    """Let parts that are not on this machine be made here instead of fetched from the hub."""
    for cls in (t.PreTrainedTokenizerBase, t.AutoTokenizer):
        for piece, make in TOKENIZERS:
            _replace(cls, piece, make)
    for cls, piece, make in parts():
        _replace(cls, piece, make)


def _replace(cls: Part, piece: str, make: Callable[[], Part]) -> None:
    """Let ``from_pretrained`` make what is not there and has a piece in its name."""
    original = cls.from_pretrained.__func__

    def from_pretrained(kind: type, name: str, *args: Part, **kwargs: Part) -> Part:
        if piece not in str(name).lower() or Path(str(name)).exists():
            return original(kind, name, *args, **kwargs)
        part = make()
        for setting in SETTINGS:
            if setting in kwargs:
                setattr(part, setting, kwargs[setting])
        return part

    cls.from_pretrained = classmethod(from_pretrained)


def fit_to_tokenizers_(components: dict[str, Part]) -> None:
    """Give text encoders a row for each token of the stand-ins' vocabularies, and their marks."""
    for name, part in components.items():
        if isinstance(part, t.Gemma2ForCausalLM):  # its logits were as many as a prompt's features
            settings = {**part.config.to_dict(), "hidden_size": part.config.vocab_size}
            components[name] = t.Gemma2Model(t.Gemma2Config(**settings))
    parts = list(components.values())
    tokenizers = [*parts, *(getattr(part, "tokenizer", None) for part in parts)]
    sizes = [len(each) for each in tokenizers if isinstance(each, t.PreTrainedTokenizerBase)]
    processors = [part for part in parts if isinstance(part, t.ProcessorMixin)]
    for part in parts:
        table = _table_of(part)
        if table is not None and len(table.weight) < max(sizes, default=0):
            part.resize_token_embeddings(max(sizes))
            if hasattr(part.config, "encoder"):  # which a model of it alone is loaded by
                part.config.encoder.vocab_size = max(sizes)
        for processor in processors if table is not None else ():
            for mark in ("image_token_id", "video_token_id", "vision_start_token_id"):
                if hasattr(part.config, mark) and hasattr(processor, mark):
                    setattr(part.config, mark, getattr(processor, mark))


def fit_to_pictures_(components: dict[str, Part]) -> None:
    """Let processors of pictures make the size of the networks that they are for.

    A video pipeline is given an encoder of the one size that it enlarges pictures to.
    """
    network = components.get("image_encoder") or components.get("depth_estimator")
    side = getattr(getattr(network, "config", None), "image_size", None)
    for name in ("feature_extractor", "image_processor"):
        processor = components.get(name)
        if isinstance(side, int) and isinstance(processor, t.CLIPImageProcessor):
            processor.size = {"shortest_edge": side}
            processor.crop_size = {"height": side, "width": side}
        elif isinstance(side, int) and isinstance(processor, t.DPTImageProcessor):
            processor.size = {"height": side, "width": side}
    encoder = components.get("image_encoder")
    if isinstance(components.get("unet"), UNetSpatioTemporalConditionModel) and encoder is not None:
        config = {**encoder.config.to_dict(), "image_size": 224, "patch_size": 32}
        components["image_encoder"] = type(encoder)(type(encoder.config).from_dict(config))


def give_values_(components: Mapping[str, Part]) -> None:
    """Fill parameters that a test makes without values, as no trained model has them."""
    for part in components.values():
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            if not parameter.isfinite().all():
                nn.init.normal_(parameter, std=0.02)


def _table_of(part: Part) -> Part:
    """Return the table of tokens of a text encoder, None for any other part."""
    try:
        table = part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return table if isinstance(table, nn.Embedding) else None
