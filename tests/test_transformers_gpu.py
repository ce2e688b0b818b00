"""Models of transformers with sparse attention on a GPU: the kernels, the cache, compiled layers, training."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from flash_sparse_attention import SequenceLayout
from flash_sparse_attention.integrations.transformers import conversion_config, convert, warm_up
from tiny_transformers import base_model, tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")
SIZES = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "num_selected_blocks": 4, "window_size": 24}


def sparse_on_gpu(architecture: str, impl: str = "auto", **options):
    base = base_model(architecture, torch.float32, head_dim=16)
    model = convert(base, conversion_config(**SIZES), impl=impl, **options)
    return model.to("cuda").eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generates_the_same_with_every_cache(architecture: str):
    model = sparse_on_gpu(architecture)
    tokens = tokens_of(2, 120).cuda()
    mask = torch.ones_like(tokens)
    mask[0, :50] = 0
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    expected = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), expected)
    assert torch.equal(
        expected[:1, 50:], model.generate(tokens[:1, 50:], **options | {"attention_mask": mask[:1, 50:]})
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_blockwise(checkpointing: bool):
    tokens, layout = tokens_of(1, 200).cuda(), SequenceLayout.from_lengths([130, 70], "cuda")
    found = {}
    for impl in ("triton", "blockwise"):
        torch.manual_seed(0)
        model = sparse_on_gpu("qwen3", impl).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=tokens, layout=layout, use_cache=False).logits.square().mean().backward()
        found[impl] = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert found["triton"].keys() == found["blockwise"].keys()
    for name, gradient in found["triton"].items():
        expected = found["blockwise"][name]
        assert (gradient - expected).norm() <= 1e-3 * expected.norm() + 1e-7, name


# torch.compile hides a warning of its own, which an error is not.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
# It also advises faster products of float32, which would not be those that are compared.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_compiled_layers_compute_the_same():
    model = sparse_on_gpu("llama")
    tokens, layout = tokens_of(1, 200).cuda(), SequenceLayout.from_lengths([130, 70], "cuda")
    compiled = copy.deepcopy(model)
    for layer in compiled.model.layers:
        layer.compile()
    expected = model(input_ids=tokens, layout=layout, use_cache=False).logits
    found = compiled(input_ids=tokens, layout=layout, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found.square().mean().backward()
    assert all(x.grad is not None for x in compiled.parameters() if x.requires_grad)


def test_warm_up_under_autocast_comes_closer():
    model = sparse_on_gpu("llama", gates=(0.3, 0.3, 0.3))
    batches = [{"input_ids": tokens_of(2, 150).cuda()}]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses = [record.loss for record in warm_up(model, batches, steps=20)]
    assert losses[-1] < 0.8 * losses[0]
