"""Several GPUs: FSDP2 over NCCL gives the losses of one, and a model whose layers are on two computes what it did."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, DynamicCache

from flash_sparse_attention import SequenceLayout
from flash_sparse_attention.integrations.transformers import conversion_config
from flash_sparse_attention.training import load_model, log, train
from flash_sparse_attention.training.pretrained import _enable_checkpointing as enable_checkpointing
from parallel_runs import configs, losses, make_runs, numbers, records, train_by_torchrun
from tiny_transformers import sparse_model, tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

NSA = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "num_selected_blocks": 4, "window_size": 24}
FIRST = {"model.embed_tokens": 0, "model.layers.0": 0}
SECOND = {"model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
# accelerate puts the rotary embedding, the last of a decoder's modules, on the last device.
MAPS = {
    "rotary first": {**FIRST, "model.rotary_emb": 0, **SECOND},
    "rotary last": {**FIRST, **SECOND, "model.rotary_emb": 1},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of one GPU and of two."""
    return make_runs(tmp_path_factory.mktemp("runs"), "cuda")


class TestTraining:
    @pytest.mark.parametrize("name", ["pretrained", "checkpointed", "converted", "bytes"])
    def test_two_gpus_compute_what_one_does(self, runs: Path, name: str):
        one, two = runs / "one" / name, runs / "two" / name
        # Before the first step, and then what the optimizer makes of the rounding.
        assert losses(two)[0] == pytest.approx(losses(one)[0], rel=1e-5)
        assert numbers(two) == pytest.approx(numbers(one), rel=1e-3)
        assert [x.total_tokens for x in records(two)] == [x.total_tokens for x in records(one)]

    @pytest.mark.parametrize(("name", "wide"), [("bf16", "pretrained"), ("converted-bf16", "converted")])
    def test_bf16(self, runs: Path, name: str, wide: str):
        one, two = runs / "one" / name, runs / "two" / name
        assert losses(two) == pytest.approx(losses(one), rel=1e-2)
        assert losses(two) != losses(runs / "two" / wide)[:2]

    def test_either_goes_on_from_the_other(self, runs: Path):
        longer = numbers(runs / "one" / "longer")
        assert numbers(runs / "one" / "handed-over") == pytest.approx(longer, rel=1e-3)
        train(configs(runs, "cuda")["pretrained"].replace(steps=6), runs / "two" / "pretrained", resume=True)
        assert numbers(runs / "two" / "pretrained") == pytest.approx(longer, rel=1e-3)

    def test_checkpoints_are_whole(self, runs: Path):
        weights = [
            AutoModelForCausalLM.from_pretrained(runs / name / "converted" / "step-00000004").state_dict()
            for name in ("one", "two")
        ]
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name], weight, rtol=1e-2, atol=1e-3)
        assert torch.isfinite(load_model(runs / "two" / "bytes")[0].embed_tokens.weight).all()

    def test_a_signal_to_any_process_ends_all_behind_one_step(self, runs: Path):
        assert [x.step for x in records(runs / "two" / "stopped")] == [1, 2]

    def test_processes_that_disagree(self, runs: Path):
        assert not (runs / "two" / "not-a-number" / "log.jsonl").exists()
        assert numbers(runs / "two" / "of-two-minds") == pytest.approx(numbers(runs / "one" / "pretrained"), rel=1e-3)

    def test_what_a_gpu_tells(self, runs: Path):
        record = log.read(runs / "two" / "converted" / "log.jsonl")[-1]
        assert record.peak_memory_gib > 0
        assert record.mfu is None or 0 < record.mfu < 1

    @pytest.mark.slow
    def test_torchrun(self, tmp_path: Path):
        done = train_by_torchrun(tmp_path, "cuda")
        assert done.returncode == 0, done.stderr
        assert "on 2 x cuda in fp32, into runs/model" in done.stdout
        assert [x.step for x in records(tmp_path / "runs" / "model")] == [1, 2]


@pytest.fixture(params=MAPS, ids=str)
def pair(request) -> tuple:
    """A model on one device, and the same on two."""
    whole = sparse_model("llama", conversion_config(**NSA), dtype=torch.float32, head_dim=16)
    spread = dispatch_model(copy.deepcopy(whole), MAPS[request.param], skip_keys=whole._skip_keys_device_placement)
    return whole.to("cuda:0"), spread


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of tokens, of which the first is padded on the left, and their mask."""
    tokens = tokens_of(2, 120).to("cuda:0")
    mask = torch.ones_like(tokens)
    mask[0, :50] = 0
    return tokens, mask


class TestDeviceMap:
    @pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
    def test_logits_and_gradients(self, pair: tuple, kind: str):
        tokens, mask = padded()
        options = {
            "plain": {},
            "padded": {"attention_mask": mask},
            "packed": {"layout": SequenceLayout.from_lengths([100, 20, 120], "cuda:0")},
        }[kind]
        tokens = tokens.view(1, -1) if kind == "packed" else tokens
        real = mask.bool() if kind == "padded" else torch.ones_like(tokens).bool()
        found = []
        for model in pair:
            model.train()
            logits = model(input_ids=tokens, use_cache=False, **options).logits
            assert logits.device == tokens.device
            logits[real].square().mean().backward()
            found.append((logits[real].detach(), {name: x.grad for name, x in model.named_parameters()}))
        (expected, gradients), (logits, spread) = found
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert {x.device.index for x in pair[1].parameters()} == {0, 1}
        for name, parameter in pair[1].named_parameters():
            assert (spread[name] is None) == (gradients[name] is None), name
            if spread[name] is not None:
                assert spread[name].device == parameter.device
                difference = spread[name].to("cuda:0") - gradients[name]
                assert difference.norm() <= 1e-3 * gradients[name].norm() + 1e-7, name

    def test_gradient_checkpointing(self, pair: tuple):
        _, spread = pair
        tokens, _ = padded()
        found = []
        for checkpointing in (False, True):
            spread.train()
            if checkpointing:
                enable_checkpointing(spread)
            spread.zero_grad()
            spread(input_ids=tokens, use_cache=False).logits.square().mean().backward()
            found.append([x.grad.clone() for x in spread.parameters() if x.grad is not None])
        for once, again in zip(*found, strict=True):
            assert (again - once).norm() <= 1e-3 * once.norm() + 1e-7

    @pytest.mark.parametrize("padding", [False, True])
    def test_generates_the_same(self, pair: tuple, padding: bool):
        tokens, mask = padded()
        options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = mask if padding else torch.ones_like(mask)
        expected = pair[0].generate(tokens, **options)
        assert torch.equal(pair[1].generate(tokens, **options), expected)
        assert torch.equal(pair[1].generate(tokens, use_cache=False, **options), expected)

    def test_beams_and_static_caches(self, pair: tuple):
        tokens, mask = padded()
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
        for more in ({"num_beams": 3}, {"cache_implementation": "static"}):
            expected = pair[0].generate(tokens, **options, **more)
            assert torch.equal(pair[1].generate(tokens, **options, **more), expected)

    def test_each_device_keeps_the_keys_of_its_layers(self, pair: tuple):
        _, spread = pair
        tokens, mask = padded()
        cache = DynamicCache(config=spread.config)
        with torch.no_grad():
            read = spread(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
            assert read.logits.device == tokens.device
        parts = cache.layers[0].caches._caches
        assert {device.index: len(part.layers) for device, part in parts.items()} == {0: 1, 1: 2}
        for device, part in parts.items():
            assert part.lengths == (70, 120)
            assert {layer.k.device for layer in part.layers} == {device}

    def test_saves_and_loads(self, pair: tuple, tmp_path: Path):
        whole, spread = pair
        spread.save_pretrained(tmp_path)
        tokens, mask = padded()
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
        expected = whole.generate(tokens, **options)
        for device_map in (dict(spread.hf_device_map), "balanced", {"": 1}):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
            assert torch.equal(loaded.generate(tokens.to(loaded.device), **options).to("cuda:0"), expected), device_map
