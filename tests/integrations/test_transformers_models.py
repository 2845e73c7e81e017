"""Models of transformers that lost sections: caches, configurations, files, hybrids, two stacks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported

import copy
import itertools

import pytest
import torch

import layerprune
from layerprune import eliminate_sections, find_sections, renumber, verify
from layerprune.compaction import remove_sections
from layerprune.gate import Gate
from layerprune.sections.discovery import survey

transformers = pytest.importorskip("transformers")

# `cache` is its new name, which no older version knows.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")

WORDS, LENGTH, LAYERS, PROMPT, WINDOW = 32, 9, 4, 5, 4
EXAMPLE = {"input_ids": torch.ones(2, 6, dtype=torch.long)}
ENDLESS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
COMMON = {
    "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "vocab_size": WORDS,
    "max_position_embeddings": 32, **ENDLESS,
}  # fmt: skip
GROUPED = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 1}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": WINDOW}
TYPES = ["sliding_attention", "full_attention"] * (LAYERS // 2)
GPT2 = {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "vocab_size": WORDS, "n_positions": 32}
DECODERS = {
    "GPT2LMHeadModel": ("GPT2Config", {**GPT2, **ENDLESS}),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", {**GROUPED, "sliding_window": WINDOW}),
    "Gemma2ForCausalLM": ("Gemma2Config", GEMMA),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**GEMMA, "layer_types": TYPES}),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**COMMON, "intermediate_size": 24}),
}
HYBRIDS = ["Gemma2ForCausalLM", "Gemma3ForCausalLM"]
ATTENTION, WHOLE = "the first layer's attention", "two layers"
# Attentions of the sliding kind are in layers 0 and 2.
LOST = {
    ATTENTION: ["0 attention"],
    "an inner attention": ["2 attention"],
    "the attention of one kind": ["0 attention", "2 attention"],
    WHOLE: ["0 attention", "0 mlp", "2 attention", "2 mlp"],
    "a layer and an attention": ["0 attention", "0 mlp", "1 attention"],
}


def _decoder(name, **further):
    config, options = DECODERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options, **further)
    model = getattr(transformers, name)(config).eval()
    for value in model.state_dict().values():
        value.add_(0.3 * torch.randn_like(value))
    return model


def _chosen(model, lost):
    sections = find_sections(model, EXAMPLE)
    assert len(sections) == 2 * LAYERS
    kinds = {"attention": 0, "mlp": 1}
    places = [entry.split() for entry in LOST[lost]]
    return [sections[2 * int(layer) + kinds[part]] for layer, part in places]


def _close(sections):
    for section in sections:
        gate = Gate(section.name)
        gate.is_open = False
        section.attach(gate)


def _without(name, lost):
    model = _decoder(name)
    chosen = _chosen(model, lost)
    remove_sections(model, chosen)
    return model, [section.name for section in chosen]


@torch.no_grad()
def _check_generation(model):
    """With a cache as without one, by the library's loop and by one's own, beyond the window."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(2, WORDS, (3, PROMPT), generator=generator)
    cached, whole = (
        model.generate(prompt, max_length=LENGTH, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert cached.shape == (3, LENGTH) and cached.equal(whole)
    past, found = None, []
    for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]:
        step = model(whole[:, start:end], past_key_values=past, use_cache=True)
        past = step.past_key_values
        found.append(step.logits)
    expected = model(whole, use_cache=False).logits
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-4)
    return expected


@pytest.mark.parametrize(
    "name, lost",
    [*((name, ATTENTION) for name in DECODERS), *itertools.product(HYBRIDS, [*LOST][1:])],
)
def test_generation_with_a_cache(name, lost):
    """While the gates are closed, when the sections are gone, when their places are gone."""
    model, closed = _decoder(name), _decoder(name)
    chosen = _chosen(model, lost)
    _close([section.in_model(closed) for section in chosen])
    remove_sections(model, chosen)
    expected = _check_generation(model)
    assert _check_generation(closed).equal(expected)
    assert _check_generation(renumber(model, [s.name for s in chosen])).equal(expected)


@pytest.mark.parametrize(
    "lost",
    [["1.self_attn"], ["1.self_attn", "3.self_attn"], ["0.mamba"], ["0.mamba", "0.feed_forward"]],
)
def test_a_configuration_that_derives_the_types_of_its_layers(lost):
    """Jamba's: caches work, and the layers have to keep their places."""
    config = transformers.JambaConfig(
        **GROUPED, num_experts=2, mamba_d_state=4, mamba_dt_rank=4, attn_layer_period=2,
        attn_layer_offset=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.JambaForCausalLM(config).eval()
    names = [f"model.layers.{name}" for name in lost]
    expected = _check_generation(eliminate_sections(model, names, EXAMPLE))
    if len({name.partition(".")[0] for name in lost}) < len(lost):
        before = dict(model.named_modules()), config.to_dict()
        with pytest.raises(ValueError, match="JambaConfig derives .* from num_hidden_layers"):
            renumber(model, names)
        assert (dict(model.named_modules()), config.to_dict()) == before
    assert _check_generation(model).equal(expected)


def test_attentions_that_are_scaled_by_their_number():
    """It is part of what GPT-2's layers compute from the start, and their place in a cache."""
    model = _decoder("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)
    names = ["transformer.h.0.attn", "transformer.h.0.mlp", "transformer.h.2.attn"]
    expected = _check_generation(eliminate_sections(model, names, EXAMPLE))
    assert _check_generation(renumber(model, names, EXAMPLE)).equal(expected)


def test_the_only_attention_of_a_hybrid():
    """LFM2's convolutions tell no length; the place of the attention that is gone has to stay."""
    kinds = ["conv", "full_attention", "conv"]
    config = transformers.Lfm2Config(**{**GROUPED, "num_hidden_layers": 3}, layer_types=kinds)
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(config).eval()
    eliminate_sections(model, ["model.layers.1.self_attn"], EXAMPLE)
    assert config.layer_types == kinds
    prompt = torch.randint(2, WORDS, (2, PROMPT))
    cached, whole = (
        model.generate(prompt, max_length=LENGTH, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert cached.equal(whole)


MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
       "mlp_only_layers": [0]}  # fmt: skip
VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
UNTOLD = {
    "a dense layer among experts": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE, EXAMPLE,
        ["model.layers.0.self_attn", "model.layers.0.mlp"],
    ),
    "stages": (
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [8, 8], "depths": [2, 2], "num_stages": 2, "patch_size": 2},
        {"pixel_values": torch.zeros(2, 3, 16, 16)},
        ["convnext.encoder.stages.0.layers.0"],
    ),
    "stages by the names of the layers": (
        "Dinov2ForImageClassification", "Dinov2Config",
        {
            "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8,
        },
        {"pixel_values": torch.zeros(2, 3, 16, 16)},
        ["dinov2.encoder.layer.1"],
    ),
    "a decoder as deep as the encoder": (
        "ViTMAEForPreTraining", "ViTMAEConfig",
        {
            **VIT, "image_size": 8, "patch_size": 4, "num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2, "decoder_hidden_size": 16,
            "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24,
        },
        {"pixel_values": torch.zeros(2, 3, 8, 8)},
        ["decoder.decoder_layers.1.attention", "decoder.decoder_layers.1.mlp"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNTOLD)
def test_depths_that_a_configuration_cannot_tell(case):
    """`from_pretrained` would build other layers than are left: they keep their places."""
    name, config, options, inputs, lost = UNTOLD[case]
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    found = [section.name for section in find_sections(model, inputs)]
    lost = [each for each in found if any(each.startswith(place) for place in lost)]
    assert lost
    eliminate_sections(model, lost, inputs)
    before = dict(model.named_modules()), model.config.to_dict()
    with pytest.raises(ValueError, match="Config would build another one"):
        renumber(model, lost)
    assert (dict(model.named_modules()), model.config.to_dict()) == before


def test_a_refusal_leaves_configurations_in_their_places():
    part = {**VIT, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": WORDS, "max_position_embeddings": 16},
        vision_config={**part, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config)
    with pytest.raises(ValueError, match="no module 'nonsense'"):
        renumber(model, ["nonsense"])
    assert model.config.text_config is model.text_model.config


WHOLE_LAYERS = {
    "OPTForCausalLM": (
        "OPTConfig", {**COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    ),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {
            "hidden_size": 16, "num_layers": LAYERS, "num_heads": 2, "vocab_size": WORDS,
            "max_position_embeddings": 32, "window_size": WINDOW,
            "attention_types": [[["global", "local"], LAYERS // 2]], **ENDLESS,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_LAYERS)
def test_a_cache_of_whole_layers(name):
    config, options = WHOLE_LAYERS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    closed, sections = copy.deepcopy(model), find_sections(model, EXAMPLE)
    assert [section.kind for section in sections] == ["opaque"] * LAYERS
    _close([section.in_model(closed) for section in sections[::2]])
    remove_sections(model, sections[::2])
    assert _check_generation(closed).equal(_check_generation(model))


@pytest.mark.parametrize("name", DECODERS)
def test_the_configuration_has_the_true_depth(name, tmp_path):
    """Whole layers: what was saved is loaded as any model of that depth is."""
    model, chosen = _without(name, WHOLE)
    expected = _check_generation(model)
    renumber(model, chosen)
    assert model.config.num_hidden_layers == LAYERS - 2
    if name in HYBRIDS:
        assert model.config.layer_types == ["full_attention"] * 2
    assert not any("layerprune" in type(module).__module__ for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert _check_generation(loaded.eval()).equal(expected)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.parametrize(
    "lost, renumbered", [(ATTENTION, False), ("a layer and an attention", True)]
)
def test_half_layers_are_taken_out_again_behind_from_pretrained(name, lost, renumbered, tmp_path):
    model = _decoder(name)
    chosen = [section.name for section in _chosen(model, lost)]
    pruner = layerprune.LayerPruner(model, example_inputs=EXAMPLE, total_steps=100, strength=0.1)
    for index, info in enumerate(pruner.sections):
        pruner._run.bank.theta[index] = float(info.name not in chosen)
    pruner.strip(renumber=renumbered)
    expected = _check_generation(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    eliminate_sections(loaded, loaded.config.layerprune_eliminated, EXAMPLE)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert _check_generation(loaded.eval()).equal(expected)


def test_types_of_layers_follow_a_renumbering():
    model, chosen = _without("Gemma3ForCausalLM", "a layer and an attention")
    renumber(model, chosen)
    assert model.config.layer_types == TYPES[1:]
    numbers = {n: m.layer_idx for n, m in model.named_modules() if hasattr(m, "q_proj")}
    # What is left is sliding, full; the places of a cache are full, sliding, full.
    assert numbers == {"model.layers.1.self_attn": 1, "model.layers.2.self_attn": 0}


def _t5():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=WORDS,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _bart():
    config = transformers.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=WORDS,
        max_position_embeddings=32, decoder_start_token_id=2, forced_eos_token_id=None, **ENDLESS,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("build", [_t5, _bart])
def test_an_encoder_and_a_decoder(build):
    """What is found can go, one by one and all; what is left out has a reason."""
    torch.manual_seed(0)
    model = build().eval()
    for value in model.state_dict().values():
        value.add_(0.2 * torch.randn_like(value))
    inputs = {
        "input_ids": torch.randint(1, WORDS, (3, 6)),
        "decoder_input_ids": torch.randint(1, WORDS, (3, 4)),
    }
    found = survey(model, inputs)
    names = [section.name for section in found.sections]
    assert names and all(found.left_out.values())
    attentions = [name for name in names if "attn" in name]
    if build is _t5:  # the first layer's position bias serves the others
        assert not attentions and len(found.left_out) == 6
    for gone in (names[:1], names[-1:], attentions[4:5], names):
        gated, compacted = copy.deepcopy(model), copy.deepcopy(model)
        _close([s.in_model(gated) for s in found.sections if s.name in gone])
        chosen = [section for section in found.sections if section.name in gone]
        remove_sections(compacted, [section.in_model(compacted) for section in chosen])
        assert verify(gated, compacted, [{**inputs, "use_cache": False}]) == 0.0
        with torch.no_grad():
            whole, *cached = (
                each.generate(inputs["input_ids"], max_length=7, use_cache=use)
                for each, use in ((compacted, False), (compacted, True), (gated, True))
            )
        assert all(words.equal(whole) for words in cached), gone


def test_what_is_left_of_the_only_layer_of_a_type():
    """ModernBERT's layers ask for the mask of their own type, of which there may be none now."""
    config = transformers.ModernBertConfig(
        **{**COMMON, "num_hidden_layers": 3, "intermediate_size": 24, "local_attention": WINDOW},
        cls_token_id=1,
        sep_token_id=1,
    )
    model = transformers.ModernBertForSequenceClassification(config).eval()
    closed, words = copy.deepcopy(model), {"input_ids": torch.randint(2, WORDS, (2, 12))}
    first = survey(model, words).sections[0]
    _close([first.in_model(closed)])
    remove_sections(model, [first])
    assert verify(closed, model, [words]) == 0.0
