"""Writes a llama model so small that it loads at once: tiny_model.py FILE

The weights are random, so its answers are nonsense; only their form is of use. Two things keep that
form tidy. The vocabulary holds short syllables beside the byte tokens that the tokenizer needs for
text it does not know. And the output rows of all that is no syllable are zero: their logits are
zero, some syllable's is always above that, and greedy sampling (temperature 0) picks only syllables.
In particular it never picks the end of the text, so an answer has as many tokens as were asked for.
"""

import sys

import gguf
import numpy as np

CONTEXT = 1024
WIDTH = 32
HIDDEN = 64
HEADS = 2
LAYERS = 1

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def vocabulary():
    """Tokens as (text, score, type), and how many of them are no syllables."""
    kind = gguf.TokenType
    tokens = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    tokens += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)]
    tokens += [("\u2581", -100.0, kind.NORMAL)]
    silent = len(tokens)
    syllables = [consonant + vowel for consonant in "bdklmnrst" for vowel in "aeiou"]
    pieces = syllables + ["\u2581" + syllable for syllable in syllables]
    tokens += [(piece, -1.0 - rank, kind.NORMAL) for rank, piece in enumerate(pieces)]
    return tokens, silent


def tensors(words, silent):
    """Weights by tensor name, always the same."""
    draw = np.random.default_rng(seed=20).standard_normal

    def matrix(rows, columns):
        return (draw((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    output = matrix(words, WIDTH)
    output[:silent] = 0.0
    yield "token_embd", draw((words, WIDTH)).astype(np.float32)
    yield "output_norm", np.ones(WIDTH, dtype=np.float32)
    yield "output", output
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}", np.ones(WIDTH, dtype=np.float32)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{name}", matrix(WIDTH, WIDTH)
        for name, rows, columns in (
            ("ffn_gate", HIDDEN, WIDTH),
            ("ffn_up", HIDDEN, WIDTH),
            ("ffn_down", WIDTH, HIDDEN),
        ):
            yield f"blk.{layer}.{name}", matrix(rows, columns)


def write(path):
    tokens, silent = vocabulary()
    texts, scores, kinds = zip(*tokens)
    out = gguf.GGUFWriter(path, "llama")
    out.add_name("tiny-random")
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_vocab_size(len(tokens))
    out.add_context_length(CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_feed_forward_length(HIDDEN)
    out.add_block_count(LAYERS)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("llama")
    out.add_token_list(list(texts))
    out.add_token_scores(list(scores))
    out.add_token_types(list(kinds))
    out.add_unk_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template(CHAT_TEMPLATE)
    for name, weights in tensors(len(tokens), silent):
        out.add_tensor(f"{name}.weight", weights)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    write(sys.argv[1])
