"""The network is a Llama like transformers' and llama.cpp's; its watched heads are heads it has."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from rekindle.model.ember.grammar import POOLS  # noqa: E402
from rekindle.model.ember.language import Kind, generate_document, generate_questions  # noqa: E402

TINY = {"vocabulary_size": 300, "width": 32, "num_heads": 4, "num_kv_heads": 2, "head_width": 8, "inner_width": 48}


def test_a_watched_head_reports_its_own_attention_weights() -> None:
    from rekindle.model.ember.network import WATCHED_HEADS, Network, Shape, Watch, rotation

    torch.manual_seed(0)
    network = Network(Shape(**TINY))
    tokens = torch.randint(0, 300, (2, 11))
    watch = Watch(torch.tensor([0, 1, 1]), torch.tensor([5, 10, 7]), torch.tensor([2, 9, 0]))
    for name, (layer_number, head) in WATCHED_HEADS.items():
        hidden, losses = network(tokens, watches={name: watch})
        # by hand: the weights of this head from the layer's input
        inputs: list[Any] = []

        def keep(_: Any, args: Any, inputs: list[Any] = inputs) -> None:
            inputs.append(args[0])

        handle = network.layers[layer_number].attention.register_forward_pre_hook(keep)
        again, none = network(tokens)
        handle.remove()
        assert torch.equal(hidden, again)
        assert none == {}
        qkv = network.layers[layer_number].attention.qkv(inputs[0]).view(2, 11, 8, 8)
        cos, sin = rotation(network.shape, torch.arange(11))

        def turn(x: Any, cos: Any = cos, sin: Any = sin) -> Any:
            return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

        scores = turn(qkv[:, :, head]) @ turn(qkv[:, :, 4 + head // 2]).transpose(1, 2) / 8**0.5
        weights = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf).softmax(-1)
        expected = -weights[watch.batch, watch.row, watch.target].log().mean()
        assert torch.allclose(losses[name], expected, atol=1e-5)


def test_transformers_computes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from rekindle.model.ember.network import Network, Shape, config_for_transformers, state_for_transformers

    torch.manual_seed(1)
    network = Network(Shape(**TINY))
    config = transformers.LlamaConfig(**config_for_transformers(network.shape))
    model = transformers.LlamaForCausalLM(config).float()
    missing, unexpected = model.load_state_dict(state_for_transformers(network), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []) or (missing, unexpected) == ([], [])
    model.tie_weights()
    tokens = torch.randint(0, 300, (1, 40))
    with torch.no_grad():
        expected = model(tokens).logits
        found = network.logits(network(tokens)[0])
    assert torch.allclose(found, expected, atol=1e-4)


def test_heads_are_put_in_llama_cpps_order() -> None:
    pytest.importorskip("gguf")
    from rekindle.model.ember.export import interleave_heads

    rows = np.arange(16, dtype=np.float16).reshape(16, 1)
    assert interleave_heads(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def _prompt(ids: Mapping[str, int]) -> list[int]:
    from rekindle.model.ember.evaluate import document_prompt, question_and_answer

    document = generate_document("both formats", num_tokens=900)
    question = generate_questions(document, 0, kinds=(Kind.TWO_HOP,))[0]
    asked, answer = question_and_answer(ids, question)
    return [*document_prompt(ids, document), *asked, *answer]


def test_both_formats_give_the_same_logits(network: Any, ids: Mapping[str, int]) -> None:
    """Measured: 0.026 at most (llama.cpp keeps KV in float16), where logits have a standard deviation of 4.8."""
    import llama_cpp

    from rekindle.model.ember import weights_path

    prompt = _prompt(ids)
    llama = llama_cpp.Llama(str(weights_path()), n_ctx=1024, n_threads=1, logits_all=True, verbose=False)
    llama.eval(prompt)
    found = np.array(llama.scores[: len(prompt)])
    llama.close()
    with torch.no_grad():
        expected = network.logits(network(torch.tensor([prompt]))[0][0]).numpy()
    assert np.abs(found - expected).max() < MAX_DIFFERENCE


MAX_DIFFERENCE = 0.08


def test_the_committed_files_are_small_and_of_one_shape(network: Any, tokenizer: Any) -> None:
    from rekindle.model.ember import hf_path, weights_path

    files = [weights_path(), *hf_path().iterdir()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    config = json.loads((hf_path() / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.get_vocab_size() == network.shape.vocabulary_size
    assert config["max_position_embeddings"] == 4096
    assert len(POOLS["person"]) < config["vocab_size"]
