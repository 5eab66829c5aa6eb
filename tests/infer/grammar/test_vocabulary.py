import numpy as np
import pytest
import tokenizers as hf

from jaxalope.data.tokenizers import ByteTokenizer, JsonTokenizer
from jaxalope.infer.grammar import Json, Vocabulary
from jaxalope.infer.grammar.vocabulary import Trie


def test_the_trie_holds_every_token_at_the_end_of_its_bytes(vocabulary):
    trie = vocabulary.trie
    texts, above = [], [b""]
    for parent, byte in trie.levels:
        assert parent.dtype == np.int32 and byte.dtype == np.uint8
        above = [above[p] + bytes([b]) for p, b in zip(parent, byte, strict=True)]
        texts += above
    assert len(texts) == len(set(texts)) == trie.num_nodes
    ends = [texts[n] if n < trie.num_nodes else None for n in trie.node_of_token]
    assert ends == [t or None for t in vocabulary.tokens]
    assert set(texts) == {t[:n] for t in vocabulary.tokens if t for n in range(1, len(t) + 1)}


def test_a_trie_of_nothing():
    trie = Trie.build([None, b""])
    assert trie.levels == () and trie.num_nodes == 0 and trie.node_of_token.tolist() == [0, 0]


def json_tokenizer(**byte_level):
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(**byte_level)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(['{"name": "a", "age": 3}'] * 5, trainer)
    return JsonTokenizer(tokenizer.to_str())


def test_the_tokenizers_spelling_is_kept_where_it_keeps_the_text():
    kept = Vocabulary.from_tokenizer(json_tokenizer(add_prefix_space=False))
    assert kept.encode is not None and kept.eos_id == 0 and kept.tokens[0] is None
    assert Vocabulary.from_tokenizer(json_tokenizer(add_prefix_space=True)).encode is None


@pytest.mark.parametrize("backend", ["python", "llguidance"])
def test_from_a_tokenizer_to_a_document(backend, tools):
    if backend != "python":
        pytest.importorskip(backend)
    for tokenizer in (ByteTokenizer(), json_tokenizer(add_prefix_space=False)):
        text = '{"name": [1, "é🦌"]}'
        matcher = Json().compile(tokenizer, backend=backend).matcher()
        for token in [*tokenizer.encode(text), tokenizer.eos_id]:
            assert matcher.accept(token)
        assert matcher.is_done
