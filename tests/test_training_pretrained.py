"""Training of models of transformers: the loss of packs, what a run writes, resuming, conversion, the log."""

from __future__ import annotations

import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from flash_sparse_attention import SequenceLayout
from flash_sparse_attention.integrations import transformers as integration
from flash_sparse_attention.integrations.transformers import conversion_config, convert
from flash_sparse_attention.training import (
    Progress,
    TrainConfig,
    Trainer,
    evaluate,
    load_model,
    log,
    pretrained,
    train,
)
from flash_sparse_attention.training.checkpoint import read_state
from flash_sparse_attention.training.data import Pack
from flash_sparse_attention.training.evaluation import evaluate_packs
from flash_sparse_attention.training.flops import AttentionCost
from flash_sparse_attention.training.parallel import Group
from flash_sparse_attention.training.pretrained import PackedCausalLM
from flash_sparse_attention.training.tasks import ByteTask
from pretrained_runs import FAMILIES, texts, tiny_config, write_jsonl, write_model, write_tokenizer
from training_runs import tiny_config as tiny_byte_config
from training_runs import write_texts

NSA = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 8,
    "num_selected_blocks": 4,
    "window_size": 16,
    "compression": "mean",
    "position_embedding": "none",
    "branch_kv": "shared",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder for each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: write_model(root / family, family) for family in FAMILIES}


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "corpus.jsonl", texts())


def records(output):
    return log.read(output / "log.jsonl")


def losses(output):
    """All that the log holds but times."""
    return [(x.step, x.loss, x.lr, x.grad_norm, x.total_tokens, x.eval_loss) for x in records(output)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def conversion(monkeypatch):
    """Notes how the conversion is called."""
    calls = []

    def noted(model, nsa=None, *, layers=None, impl="auto"):
        calls.append((nsa, layers, impl))
        return convert(model, nsa, layers=layers, impl=impl)

    monkeypatch.setattr(integration, "convert", noted)
    return calls


@pytest.fixture
def graphs(monkeypatch):
    """Counts of what was compiled; without code for the machine, which would take long."""
    from torch._dynamo.utils import counters

    counters.clear()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield counters["stats"]
    torch._dynamo.reset()


class TestConfig:
    def test_survives_json(self):
        config = TrainConfig(pretrained="m", convert=True, convert_layers=(0, 2), nsa={"window_size": 8})
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.replace(nsa={"block_size": 32}).nsa == {"block_size": 32}

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"pretrained": 3}, "pretrained must be a name, or None"),
            ({"pretrained": ""}, "pretrained must be a name, or None"),
            ({"convert": True}, "convert must be left out without pretrained, got True: set pretrained"),
            ({"token_cache": "x"}, "token_cache must be left out without pretrained"),
            ({"full_attention": "sdpa"}, "full_attention must be left out without pretrained"),
            ({"pretrained": "m", "convert_layers": [0]}, "convert_layers must be left out without convert"),
            ({"pretrained": "m", "nsa": {"window_size": 8}}, "nsa must be left out without convert"),
            ({"pretrained": "m", "convert": True, "convert_layers": []}, "convert_layers must be a list of layers"),
            ({"pretrained": "m", "convert": True, "convert_layers": [1, 1]}, "convert_layers must be a list of layers"),
            ({"pretrained": "m", "convert": True, "convert_layers": [-1]}, "convert_layers must be an integer"),
            ({"pretrained": "m", "convert": True, "nsa": {"window": 8}}, "no field 'window'"),
            ({"pretrained": "m", "convert": True, "nsa": 3}, "nsa must be a table"),
            ({"pretrained": "m", "model": {"num_layers": 2}}, "model must be left out with pretrained"),
            ({"text_field": ""}, "text_field must be a name"),
            ({"compile": 1}, "compile must be True or False"),
            ({"tensorboard": "yes"}, "tensorboard must be True or False"),
        ],
    )
    def test_bad_values(self, values, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_dict(values)


class TestLoss:
    def pack(self, lengths, vocabulary=320):
        count = sum(lengths)
        return (
            torch.randint(vocabulary, (count,)),
            torch.randint(vocabulary, (count,)),
            SequenceLayout.from_lengths(lengths),
        )

    def load(self, folder, **options):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("logits", [1 << 28, 320 * 7])
    def test_is_that_of_each_sequence_alone(self, models, family, logits, monkeypatch):
        monkeypatch.setattr(pretrained, "_LOGITS", logits)
        model = self.load(models[family])
        tokens, targets, layout = self.pack([5, 1, 20, 3])
        packed = PackedCausalLM(model)
        found = packed(tokens, targets, layout)
        assert packed._plain_head is True
        found.sum().backward()
        gradients = {name: x.grad.clone() for name, x in model.named_parameters()}
        model.zero_grad()
        expected = []
        for part, target in zip(tokens.split(layout.lengths), targets.split(layout.lengths), strict=True):
            expected.append(F.cross_entropy(model(input_ids=part[None]).logits[0], target, reduction="none"))
        torch.testing.assert_close(found, torch.cat(expected))
        torch.cat(expected).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("cap", [0.5, 30.0])
    def test_a_model_that_caps_its_logits_has_them_whole(self, tmp_path, cap):
        folder = write_model(tmp_path / "gemma2", "gemma2", final_logit_softcapping=cap, sliding_window=64)
        model = self.load(folder, attn_implementation="eager").eval()
        tokens, targets, layout = self.pack([9, 4])
        packed = PackedCausalLM(model)
        found = packed(tokens, targets, layout)
        assert packed._plain_head is False
        assert pretrained.decoder_of(model) is model.model
        expected = [
            F.cross_entropy(model(input_ids=part[None]).logits[0], target, reduction="none")
            for part, target in zip(tokens.split((9, 4)), targets.split((9, 4)), strict=True)
        ]
        torch.testing.assert_close(found, torch.cat(expected))
        torch.testing.assert_close(packed(tokens, targets, layout), found)

    def test_flash_attention_gets_the_bounds(self, models, monkeypatch):
        seen = []
        model = self.load(models["llama"])
        forward = model.model.layers[0].forward

        def look(hidden, **options):
            seen.append(options)
            return forward(hidden, **options)

        monkeypatch.setattr(model.model.layers[0], "forward", look)
        tokens, targets, layout = self.pack([5, 6])
        PackedCausalLM(model)(tokens, targets, layout)
        assert "cu_seq_lens_q" not in seen[0]
        packed = PackedCausalLM(model, compiled=True)
        monkeypatch.setattr(type(model.config), "_attn_implementation", "flash_attention_2", raising=False)
        monkeypatch.setattr(model.model, "forward", lambda **options: seen.append(options) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            packed(tokens, targets, layout)
        assert seen[1]["cu_seq_lens_q"] is seen[1]["cu_seq_lens_k"] is layout.cu_seqlens
        assert seen[1]["max_length_q"] == seen[1]["max_length_k"] == 11
        assert seen[1]["position_ids"][0].tolist() == layout.positions().tolist()


class TestRun:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_writes_what_it_says(self, tmp_path, models, corpus, family):
        output = tmp_path / "run"
        result = train(tiny_config(models[family], corpus), output)
        assert names(output) == [
            *("log.jsonl", "loss.png", "perplexity_by_position.png", "run.json"),
            *("step-00000002", "step-00000004", "tokens"),
        ]
        assert {"config.json", "model.safetensors", "tokenizer.json", "optimizer.safetensors", "state.json"} <= set(
            names(result.checkpoint)
        )
        first, *_, last = records(output)
        assert first.loss == pytest.approx(math.log(320), rel=0.1)
        assert last.loss < first.loss - 0.2
        assert first.perplexity_by_position is None
        assert last.perplexity_by_position == {"0": pytest.approx(math.exp(last.eval_loss))}
        assert (last.mfu, last.peak_memory_gib, last.eval_bits_per_byte) == (None, None, None)
        info = json.loads((output / "run.json").read_text())
        assert (info["unit"], info["unigram_entropy"], info["processes"]) == ("token", None, 1)
        assert result.evaluation.bits_per_byte is None

    def test_the_checkpoint_is_one_of_transformers(self, tmp_path, models, corpus):
        run = Trainer(tiny_config(models["qwen3"], corpus), tmp_path / "run")
        result = run.run()
        model = transformers.AutoModelForCausalLM.from_pretrained(result.checkpoint)
        tokenizer = transformers.AutoTokenizer.from_pretrained(result.checkpoint)
        assert model.config.tie_word_embeddings
        for name, value in run.model.model.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        assert tokenizer("red cat")["input_ids"] == run.task.tokenizer.encode(["red cat"])[0]
        # The held-out loss is that of the checkpoint.
        again = evaluate_packs(run.task, PackedCausalLM(model), run.held_out, None, Group())
        assert again.loss == pytest.approx(result.evaluation.loss, rel=1e-6)
        with pytest.raises(ValueError, match=r"of a model of transformers: use transformers: AutoModelForCausalLM"):
            load_model(tmp_path / "run")

    def test_resume_is_bit_for_bit_what_an_uninterrupted_run_is(self, tmp_path, models, corpus):
        config = tiny_config(models["llama"], corpus, steps=6)
        train(config, tmp_path / "whole")

        class PowerCut(Progress):
            def stepped(self, record):
                if record.step == 3:
                    raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut"):
            train(config, tmp_path / "parts", progress=PowerCut())
        # The model need not be where it was.
        train(config.replace(pretrained="/nowhere"), tmp_path / "parts", resume=True)
        assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
        assert len(names(tmp_path / "parts" / "tokens")) == 1
        with pytest.raises(ValueError, match=r"convert \(False, now True\)"):
            train(config.replace(convert=True), tmp_path / "parts", resume=True)
        with pytest.raises(ValueError, match=r"pretrained must be given, as for .*step-00000006, got None"):
            train(tiny_byte_config(corpus.parent), tmp_path / "parts", resume=True)
        write_jsonl(corpus, texts(), field="body")
        with pytest.raises(ValueError, match="text_field"):
            train(config.replace(text_field="body", held_out_fraction=0.3), tmp_path / "parts", resume=True)

    def test_gradient_checkpointing_changes_no_bit(self, tmp_path, models, corpus):
        train(tiny_config(models["llama"], corpus), tmp_path / "a")
        train(tiny_config(models["llama"], corpus, gradient_checkpointing=True), tmp_path / "b")
        assert losses(tmp_path / "a") == losses(tmp_path / "b")

    def test_runs_may_share_tokenised_text(self, tmp_path, models, corpus, monkeypatch):
        config = tiny_config(models["llama"], corpus, steps=1, token_cache=str(tmp_path / "cache"))
        train(config, tmp_path / "a")
        monkeypatch.setattr(pretrained.Tokenizer, "encode", None)
        train(config, tmp_path / "b")
        assert "tokens" not in names(tmp_path / "a")

    def test_tensorboard(self, tmp_path, models, corpus):
        reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        output = tmp_path / "run"
        train(tiny_config(models["llama"], corpus, tensorboard=True), output)
        train(tiny_config(models["llama"], corpus, tensorboard=True, steps=5), output, resume=True)
        found = reader.EventAccumulator(str(output / "tensorboard")).Reload()
        assert {"train/loss", "train/lr", "held_out/eval_loss", "perplexity_by_position/0"} <= set(
            found.Tags()["scalars"]
        )
        shown = [(x.step, x.value) for x in found.Scalars("train/loss")]
        assert shown == [(x.step, pytest.approx(x.loss)) for x in records(output)]

    # torch.compile hides a warning of its own, which an error is not.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    def test_compile(self, tmp_path, models, corpus, graphs):
        train(tiny_config(models["llama"], corpus, eval_packs=1), tmp_path / "plain")
        train(tiny_config(models["llama"], corpus, eval_packs=1, compile=True), tmp_path / "compiled")
        assert [x[1] for x in losses(tmp_path / "compiled")] == pytest.approx(
            [x[1] for x in losses(tmp_path / "plain")], rel=1e-5
        )
        # One graph for training and one for evaluation, whatever the packs.
        assert 1 <= graphs["unique_graphs"] <= 2


def test_a_run_does_not_replace_what_it_begins_with(tmp_path, models, corpus):
    config = tiny_config(models["llama"], corpus, steps=2)
    first = train(config, tmp_path / "run").checkpoint
    with pytest.raises(ValueError, match="pretrained must be outside of the run that is replaced"):
        train(tiny_config(first, corpus, steps=2), tmp_path / "run", overwrite=True)
    assert first.is_dir()
    assert train(config, tmp_path / "run", overwrite=True).step == 2


class TestConversion:
    def test_of_all_layers_with_its_own_sizes(self, tmp_path, models, corpus, conversion):
        config = tiny_config(models["llama"], corpus, convert=True)
        result = train(config, tmp_path / "run")
        assert conversion == [(conversion_config(), None, "auto")]
        assert result.evaluation.loss < math.log(320)
        state = read_state(result.checkpoint)
        assert state.train_config["convert"] is True

    def test_of_some_layers_with_other_sizes(self, tmp_path, models, corpus, conversion):
        options = {"convert": True, "convert_layers": [1], "nsa": {"window_size": 24}, "impl": "reference"}
        run = Trainer(tiny_config(models["llama"], corpus, **options), tmp_path / "run")
        nsa = conversion_config(window_size=24)
        assert conversion == [(nsa, (1,), "reference")]
        assert run._cost.attention == (AttentionCost(32), AttentionCost(32, nsa))
        # A window of the compressors, which have 32 logits a key/value head each, comes every 16 tokens.
        logits = sum(x.numel() for name, x in run.model.named_parameters() if "compressor" in name)
        weights = sum(x.numel() for x in run.model.parameters()) - 320 * 32 - logits * 15 // 16
        assert logits
        assert run._cost.weights == weights
        assert math.isfinite(run.run().evaluation.loss)

    def test_the_seed_decides_on_what_is_added(self, tmp_path, models, corpus, conversion):
        before = torch.get_rng_state()
        runs = []
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            nsa = {"compression": "mlp"}
            config = tiny_config(models["llama"], corpus, convert=True, nsa=nsa, seed=seed)
            runs.append(Trainer(config, tmp_path / name).model.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
        added = [name for name in runs[0] if "compressor" in name and name.endswith("weight")]
        assert added
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in added)
        assert not all(torch.equal(runs[0][name], runs[2][name]) for name in added)

    def test_packs_keep_their_sequences_apart(self, models, conversion):
        model = transformers.AutoModelForCausalLM.from_pretrained(models["llama"])
        packed = PackedCausalLM(convert(model))
        assert packed.sparse
        tokens, targets = torch.randint(320, (2, 40))
        whole = packed(tokens, targets, SequenceLayout.from_lengths([25, 15]))
        alone = packed(tokens[25:], targets[25:], SequenceLayout.from_lengths([15]))
        torch.testing.assert_close(whole[25:], alone)

    # torch.compile hides a warning of its own, which an error is not.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    def test_compile_leaves_sparse_attention_alone(self, tmp_path, models, corpus, conversion, graphs):
        train(tiny_config(models["llama"], corpus, convert=True, eval_packs=1), tmp_path / "plain")
        train(tiny_config(models["llama"], corpus, convert=True, eval_packs=1, compile=True), tmp_path / "compiled")
        assert [x[1] for x in losses(tmp_path / "compiled")] == pytest.approx(
            [x[1] for x in losses(tmp_path / "plain")], rel=1e-4
        )
        # Before and behind attention, in training and in evaluation.
        assert 2 <= graphs["unique_graphs"] <= 4

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    @pytest.mark.parametrize("attention", ["nsa", "full"])
    def test_compile_of_a_model_of_bytes(self, tmp_path, attention, graphs):
        config = tiny_byte_config(write_texts(tmp_path / "texts"), steps=12, eval_packs=1)
        config = config.replace(model={"attention": attention})
        train(config, tmp_path / "plain")
        train(config.replace(compile=True), tmp_path / "compiled")
        assert [x[1] for x in losses(tmp_path / "compiled")] == pytest.approx(
            [x[1] for x in losses(tmp_path / "plain")], rel=1e-4
        )
        assert 2 <= graphs["unique_graphs"] <= 4


class TestIntegration:
    """Converted models, from training to transformers and back."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_trains_resumes_and_loads(self, tmp_path, models, corpus, family):
        config = tiny_config(models[family], corpus, convert=True, nsa=NSA, steps=6)
        whole = train(config, tmp_path / "whole")
        train(config.replace(steps=4), tmp_path / "parts")
        resumed = train(config.replace(steps=4), tmp_path / "parts", resume=True)
        assert resumed.step == 4
        run = Trainer(config, tmp_path / "parts", resume=True)
        assert all(cost.nsa == conversion_config(**NSA) for cost in run._cost.attention)
        run.run()
        assert losses(tmp_path / "parts")[-1][5] is not None
        model = transformers.AutoModelForCausalLM.from_pretrained(whole.checkpoint)
        again = evaluate_packs(run.task, PackedCausalLM(model), run.held_out, None, Group())
        assert again.loss == pytest.approx(whole.evaluation.loss, rel=1e-6)

    def test_only_some_layers_and_the_defaults(self, tmp_path, models, corpus):
        config = tiny_config(models["llama"], corpus, convert=True, convert_layers=[1], steps=2)
        run = Trainer(config, tmp_path / "run")
        assert [cost.nsa is None for cost in run._cost.attention] == [True, False]
        assert math.isfinite(run.run().evaluation.loss)


class TestBadModels:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: None, None),
            (lambda folder: [x.unlink() for x in folder.glob("tokenizer*")], "a folder with a tokenizer"),
            (lambda folder: (folder / "config.json").unlink(), "a folder with a"),
            (lambda folder: (folder / "model.safetensors").unlink(), "a folder with a causal language model"),
            (lambda folder: write_tokenizer(folder, eos=False), "whose tokenizer has an eos_token"),
            (lambda folder: write_model(folder, vocab_size=100), "embeddings for all tokens of the text"),
        ],
    )
    def test_are_named(self, tmp_path, corpus, spoil, message):
        folder = write_model(tmp_path / "model")
        spoil(folder)
        config = tiny_config(folder, corpus, steps=1)
        if message is None:
            train(config, tmp_path / "run")
            return
        with pytest.raises(ValueError, match=f"pretrained must be .*{message}"):
            train(config, tmp_path / "run")

    def test_no_folder(self, tmp_path, corpus):
        with pytest.raises(ValueError, match=r"a folder that `save_pretrained` wrote, got '/no/model', which is none"):
            train(tiny_config("/no/model", corpus), tmp_path / "run")

    def test_transformers_missing(self, tmp_path, corpus, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "transformers", None)
        with pytest.raises(ValueError, match=r"needs the package transformers, .*flash-sparse-attention\[train\]"):
            train(tiny_config("/no/model", corpus), tmp_path / "run")


class TestPositions:
    """Perplexity by the tokens before."""

    class Counting(nn.Module):
        """A model whose logits depend on the position alone."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, tokens, layout):
            logits = torch.zeros(len(tokens), 257)
            logits[:, 7] = layout.positions() / 500
            return logits * self.scale

    def packs(self):
        found = []
        for lengths in ([1100, 3], [600, 503], [20]):
            layout = SequenceLayout.from_lengths(lengths)
            found.append(Pack(torch.zeros(sum(lengths), dtype=torch.int64), torch.full((sum(lengths),), 7), layout))
        return found

    def test_by_hand(self):
        model = self.Counting()
        result = evaluate(model, self.packs())
        positions = torch.cat([pack.layout.positions() for pack in self.packs()])
        nats = -torch.log_softmax(model(positions, SimpleNamespace(positions=lambda: positions)), -1)[:, 7].double()
        assert result.loss == pytest.approx(nats.mean().item(), rel=1e-6)
        assert list(result.perplexity_by_position) == [0, 512, 1024]
        for start, stop in ((0, 512), (512, 1024), (1024, 2048)):
            part = nats[(positions >= start) & (positions < stop)].mean().exp().item()
            assert result.perplexity_by_position[start] == pytest.approx(part, rel=1e-6)

    def test_more_processes_than_packs(self, monkeypatch):
        model, packs = self.Counting(), self.packs()
        whole = evaluate(model, packs)
        # Three of four processes have a pack; the last one takes part without.
        shares = []
        for rank in range(4):
            group = Group(rank, 4)
            monkeypatch.setattr(Group, "sum", lambda self, values: shares.append(values.clone()) or values.clamp(min=1))
            evaluate_packs(ByteTask(TrainConfig()), model, packs, None, group)
        nats, counts = sum(shares[::2]), sum(shares[1::2])
        assert counts.sum().item() == sum(len(pack.targets) for pack in packs)
        assert (nats.sum() / counts.sum()).item() == pytest.approx(whole.loss)

    def test_is_drawn_and_is_in_the_log_of_bytes_too(self, tmp_path):
        config = tiny_byte_config(write_texts(tmp_path / "texts"), steps=3)
        train(config, tmp_path / "run")
        assert list(records(tmp_path / "run")[-1].perplexity_by_position) == ["0"]
        measured = [
            log.StepRecord(step, 2.0, 0.1, 3.0, 4.0, 5, 6.0, perplexity_by_position={"0": 9.0, "512": 8.0, "1024": 7.0})
            for step in range(1, 9)
        ]
        for found in ([], measured[:1], measured):
            log.draw_perplexity_by_position(found, tmp_path / "positions.png")
            assert (tmp_path / "positions.png").read_bytes()[:4] == b"\x89PNG"
