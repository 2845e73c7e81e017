"""Gated attention and MLP of unedited models against their blocks computed by hand.

The modules of a dense copy are run on all rows, one after the other, and what a branch adds is
multiplied by the gates: of the sections' own code nothing is used.
"""

import copy

import pytest
import torch
from families import FAMILIES, LENGTH, WORDS

from layerprune import find_sections
from layerprune.gate import Gate, SectionDraw

ROWS = 7


def _dropout_off(model):
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _draw(generator):
    """Of seven rows two are off, two are probed."""
    order = torch.randperm(ROWS, generator=generator)
    gate = torch.ones(ROWS)
    gate[order[:2]] = 0.0
    gate[order[2:4]] = torch.rand(2, generator=generator) * 0.8 + 0.1
    rows = torch.nonzero(gate > 0).flatten()
    slot = torch.full((ROWS,), -1, dtype=torch.int32)
    slot[rows] = torch.arange(len(rows), dtype=torch.int32)
    return SectionDraw(gate.requires_grad_(), slot, rows, order[2:4].sort().values)


class ByHand:
    """What replaces a block's forward in the dense copy: ``gates`` are by section, by shape."""

    def __init__(self, gates):
        self.gates = gates

    def __call__(self, name, y):
        return self.gates[name].view(-1, *[1] * (y.dim() - 1)) * y


def _torchvision_vit(m, g, name, x):
    y = m.ln_1(x)
    x = x + g(f"{name}.self_attention", m.self_attention(y, y, y, need_weights=False)[0])
    return x + g(f"{name}.mlp", m.mlp(m.ln_2(x)))


def _timm_vit(m, g, name, x, **more):
    x = x + g(f"{name}.attn", m.attn(m.norm1(x), **more))
    return x + g(f"{name}.mlp", m.mlp(m.norm2(x)))


def _torchvision_swin(m, g, name, x):
    x = x + g(f"{name}.attn", m.attn(m.norm1(x)))
    return x + g(f"{name}.mlp", m.mlp(m.norm2(x)))


def _gpt2(m, g, name, x, *args, **more):
    more = {k: v for k, v in more.items() if not k.startswith("encoder")}
    x = x + g(f"{name}.attn", m.attn(m.ln_1(x), *args[:2], **more)[0])
    return x + g(f"{name}.mlp", m.mlp(m.ln_2(x)))


def _llama(m, g, name, x, **more):
    x = x + g(f"{name}.self_attn", m.self_attn(hidden_states=m.input_layernorm(x), **more)[0])
    return x + g(f"{name}.mlp", m.mlp(m.post_attention_layernorm(x)))


def _bert(m, g, name, x, mask, *others, **more):
    own, out = m.attention.self, m.attention.output
    y = out.dense(own(x, mask)[0])
    x = out.LayerNorm(x + g(f"{name}.attention.self", y))
    y = m.output.dense(m.intermediate(x))
    return m.output.LayerNorm(x + g(f"{name}.intermediate", y))


def _lengths():
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    for row in range(ROWS):
        mask[row, LENGTH - row % 3 :] = 0
    return mask


def _words(**more):
    return {"input_ids": torch.randint(1, WORDS, (ROWS, LENGTH)), **more}


def _shifted_positions():
    """Other positions in each row: rotary embeddings, a tuple of two tensors, carry the batch."""
    return torch.arange(LENGTH) + torch.arange(ROWS)[:, None]


def _images():
    return torch.randn(ROWS, 3, 16, 16)


CASES = {
    "torchvision-vit": ("EncoderBlock", _torchvision_vit, _images),
    "torchvision-swin": ("SwinTransformerBlock", _torchvision_swin, _images),
    "timm-vit": ("Block", _timm_vit, _images),
    "transformers-gpt2": ("GPT2Block", _gpt2, lambda: _words(attention_mask=_lengths())),
    "transformers-llama": ("LlamaDecoderLayer", _llama, _words),
    "transformers-llama, mask": (
        "LlamaDecoderLayer",
        _llama,
        lambda: _words(attention_mask=_lengths()),
    ),
    "transformers-llama, positions": (
        "LlamaDecoderLayer",
        _llama,
        lambda: _words(position_ids=_shifted_positions(), attention_mask=_lengths()),
    ),
    "transformers-bert": ("BertLayer", _bert, lambda: _words(attention_mask=_lengths())),
}


def _scores(model, inputs):
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("case", CASES)
def test_a_gated_model_is_its_blocks_by_hand(case):
    family = FAMILIES[case.partition(",")[0]]
    pytest.importorskip(family.library)
    block, expression, make = CASES[case]
    torch.manual_seed(0)
    model, inputs = family.build().train(), make()
    _dropout_off(model)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(0.3 * torch.randn_like(value))
    plain = copy.deepcopy(model)

    generator = torch.Generator().manual_seed(1)
    gates, drawn = {}, {}
    sections = find_sections(model, inputs)
    if "positions" in case:
        pair = {("position_embeddings", 0), ("position_embeddings", 1)}
        assert pair <= sections[0].links[-1].batched
    for section in sections:
        gate = Gate(section.name)
        gate.draw = _draw(generator)
        section.attach(gate)
        drawn[section.name] = gate.draw
        gates[section.name] = gate.draw.gate.detach().clone().requires_grad_()
    by_hand, seen = ByHand(gates), 0
    for name, module in plain.named_modules():
        if type(module).__name__ == block:
            seen += 1
            module.forward = lambda *args, m=module, n=name, **more: expression(
                m, by_hand, n, *args, **more
            )
    assert 2 * seen == len(gates)

    found, expected = _scores(model, inputs), _scores(plain, inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    dense = {name: torch.ones_like(gate) for name, gate in gates.items()}
    by_hand.gates = dense
    assert not torch.allclose(_scores(plain, inputs), expected, atol=1e-2), "the gates matter"

    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3, msg=name)
    for name, draw in drawn.items():
        wanted = torch.zeros(ROWS)
        wanted[draw.probes] = gates[name].grad[draw.probes]
        torch.testing.assert_close(draw.gate.grad, wanted, atol=1e-3, rtol=1e-3, msg=name)
