"""Every limit of a request: what is refused, and that the refusal names field, limit and value."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from fake_pipeline import VOCAB, tiny_model, tiny_tokenizer, tiny_tokenizer_bytes, tiny_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from tramontane.cluster.messages import Sampling, Stopping
from tramontane.cluster.steps import finish
from tramontane.cluster.text import detokenize
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.validation import (
    InvalidField,
    Request,
    choose_request_id,
    validate_ids,
    validate_in_steps,
)
from tramontane.protos import serving_pb2 as pb

MODEL = tiny_model(context=64, tokenizer=tiny_tokenizer())
WITHOUT_TOKENIZER = tiny_model(context=64)


def ask(model=MODEL, **fields) -> Request:
    """Validate a request for 3 ids and whatever `fields` change."""
    if "text" not in fields:
        fields = {"tokens": pb.TokenIds(ids=[5, 6, 7]), **fields}
    message = pb.GenerateRequest(**fields)
    return finish(validate_in_steps(message, model, choose_request_id(message)))


def sampling(**fields) -> dict[str, pb.Sampling]:
    return {"sampling": pb.Sampling(**fields)}


def stopping(**fields) -> dict[str, pb.Stopping]:
    return {"stopping": pb.Stopping(**fields)}


REFUSED = [
    (sampling(temperature=math.nan), "sampling.temperature", "from 0 to 100", "nan"),
    (sampling(temperature=math.inf), "sampling.temperature", "from 0 to 100", "inf"),
    (sampling(temperature=-0.5), "sampling.temperature", "from 0 to 100", "-0.5"),
    (sampling(temperature=100.5), "sampling.temperature", "from 0 to 100", "100.5"),
    (sampling(top_p=0.0), "sampling.top_p", "above 0 and at most 1", "0"),
    (sampling(top_p=1.5), "sampling.top_p", "above 0 and at most 1", "1.5"),
    (sampling(top_p=math.nan), "sampling.top_p", "above 0 and at most 1", "nan"),
    (sampling(min_p=-0.25), "sampling.min_p", "from 0 to 1", "-0.25"),
    (sampling(min_p=1.25), "sampling.min_p", "from 0 to 1", "1.25"),
    (sampling(min_p=math.nan), "sampling.min_p", "from 0 to 1", "nan"),
    (stopping(max_tokens=0), "stopping.max_tokens", "at least 1", "0"),
    (stopping(max_tokens=62), "stopping.max_tokens", "61", "62"),
    (stopping(max_tokens=2**32 - 1), "stopping.max_tokens", "61", "4294967295"),
    (stopping(max_tokens=4, min_tokens=5), "stopping.min_tokens", "4", "5"),
    (stopping(min_tokens=62), "stopping.min_tokens", "61", "62"),
    (stopping(strings=["x"] * 17), "stopping.strings", "16", "17"),
    (stopping(strings=["ok", ""]), "stopping.strings[1]", "1 to 256 bytes", "0"),
    (stopping(strings=["\N{EURO SIGN}" * 86]), "stopping.strings[0]", "1 to 256 bytes", "258"),
    (stopping(token_ids=[3] * 65), "stopping.token_ids", "64", "65"),
    (stopping(token_ids=[3, 400]), "stopping.token_ids[1]", "400", "400"),
    ({"tokens": pb.TokenIds()}, "tokens.ids", "at least 1", "empty"),
    ({"tokens": pb.TokenIds(ids=[5, 400])}, "tokens.ids[1]", "below 400", "400"),
    ({"tokens": pb.TokenIds(ids=[2**32 - 1])}, "tokens.ids[0]", "below 400", "4294967295"),
    ({"tokens": pb.TokenIds(ids=[5] * 64)}, "tokens.ids", "63", "64"),
    ({"tokens": None}, "prompt", "text or tokens", "missing"),
    ({"text": ""}, "text", "at least 1", "empty"),
    ({"text": "é" * 100}, "text", "63", "202"),
    ({"request_id": ""}, "request_id", "1 to 128", "0"),
    ({"request_id": "x" * 129}, "request_id", "1 to 128", "129"),
    ({"request_id": "two\nlines"}, "request_id", "printable ASCII", "9"),
]


@pytest.mark.parametrize(("fields", "field", "limit", "value"), REFUSED)
def test_a_refusal_names_field_limit_and_value(fields, field, limit, value):
    with pytest.raises(InvalidField) as refused:
        ask(**fields)
    message = str(refused.value)
    assert refused.value.field == field
    assert message.startswith(f"{field} ")
    assert limit in message
    assert value in message.removeprefix(field)


@pytest.mark.parametrize(
    ("fields", "field"), [({"text": "a summer"}, "text"), (stopping(strings=["secret"]), "stopping.strings")]
)
def test_a_model_without_tokenizer_takes_no_text(fields, field):
    with pytest.raises(InvalidField, match="needs a tokenizer") as refused:
        ask(WITHOUT_TOKENIZER, **fields)
    assert refused.value.field == field
    assert ask(WITHOUT_TOKENIZER).tokens.tolist() == [5, 6, 7]


def test_a_text_that_normalisation_empties_is_refused_where_no_bos_goes_before_it():
    data = tiny_tokenizer_bytes(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    tokenizer = Tokenizer(data, bos_id=None)
    tokenizer.bos_id = None
    with pytest.raises(InvalidField, match="no token after normalisation"):
        ask(tiny_model(tokenizer=tokenizer), text="   ")


def test_what_is_unset_is_filled_in():
    request = ask()
    assert replace(request.sampling, seed=0) == Sampling()
    assert request.stopping == Stopping(max_tokens=61, token_ids=(2,))
    assert request.stop_strings == ()
    assert ask(tiny_model(context=1000)).stopping.max_tokens == 256


def test_what_is_set_is_kept():
    request = ask(
        request_id="mine 1",
        sampling=pb.Sampling(temperature=0, top_k=5, top_p=0.5, min_p=0.25, seed=2**64 - 1),
        stopping=pb.Stopping(max_tokens=61, min_tokens=61, strings=["a", "b", "a"], token_ids=[9, 4, 2]),
    )
    assert request.request_id == "mine 1"
    assert request.sampling == Sampling(temperature=0.0, top_k=5, top_p=0.5, min_p=0.25, seed=2**64 - 1)
    assert request.stopping == Stopping(max_tokens=61, min_tokens=61, token_ids=(2, 4, 9))
    assert request.stop_strings == ("a", "b")


def test_ignored_eos_is_no_stop_id_unless_the_user_names_it():
    assert ask(**stopping(ignore_eos=True)).stopping.token_ids == ()
    assert ask(**stopping(ignore_eos=True, token_ids=[2])).stopping.token_ids == (2,)


def test_a_top_k_above_the_vocabulary_fits_the_stages_numbers():
    assert ask(**sampling(top_k=2**32 - 1)).sampling.top_k == VOCAB


def test_seeds_are_chosen_from_all_64_bits():
    seeds = [ask().sampling.seed for _ in range(64)]
    assert len(set(seeds)) == 64
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert any(seed >= 2**63 for seed in seeds)


def test_text_gets_bos_and_tokens_do_not():
    assert ask(text="a summer").tokens.tolist() == [1, *tiny_tokenizer().encode("a summer", add_bos=False)]
    assert ask().tokens.tolist() == [5, 6, 7]


def test_a_control_token_typed_in_a_prompt_stays_text():
    ids = ask(text="<s>[INST] summer [/INST]</s>").tokens.tolist()
    assert ids[0] == 1, "BOS"
    assert not {0, 1, 2, 3} & set(ids[1:]), "an id of <unk>, <s>, </s> or [INST]"
    assert detokenize(tiny_vocabulary(), ids, continuation=False) == "<s>[INST] summer [/INST]</s>"


def test_text_with_nul_is_text():
    assert len(ask(text="a\0b").tokens) > 1


def test_the_longest_prompt_leaves_room_for_one_token():
    request = ask(tokens=pb.TokenIds(ids=[5] * 63))
    assert request.stopping.max_tokens == 1


def test_refusals_never_quote_a_text():
    for fields in ({"text": "secret" * 100}, stopping(strings=["secret" * 100])):
        with pytest.raises(InvalidField) as refused:
            ask(**fields)
        assert "secret" not in str(refused.value)


def test_a_request_without_a_fit_name_gets_one():
    unnamed = {choose_request_id(pb.GenerateRequest()) for _ in range(8)}
    assert len(unnamed) == 8
    assert choose_request_id(pb.GenerateRequest(request_id="a\x1b[2J")) != "a\x1b[2J"


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized():
    message = pb.GenerateRequest(text="x" * 4000)
    steps = validate_in_steps(message, MODEL, choose_request_id(message))
    with pytest.raises(InvalidField, match=r"may be 63 tokens.*; it is at least \d+$"):
        next(steps)


@settings(deadline=None)
@given(st.lists(st.integers(0, 500)))
def test_ids_are_checked_one_by_one(ids):
    wrong = [place for place, token in enumerate(ids) if token >= VOCAB]
    if wrong:
        with pytest.raises(InvalidField) as refused:
            validate_ids("ids", ids, VOCAB)
        assert refused.value.field == f"ids[{wrong[0]}]"
    else:
        assert validate_ids("ids", ids, VOCAB).tolist() == ids
        assert validate_ids("ids", ids, VOCAB).dtype == np.int32


@settings(deadline=None)
@given(
    st.floats(width=32), st.floats(width=32), st.floats(width=32), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)
)
def test_whatever_passes_is_within_what_the_stages_take(temperature, top_p, min_p, max_tokens, min_tokens):
    try:
        request = ask(
            sampling=pb.Sampling(temperature=temperature, top_p=top_p, min_p=min_p),
            stopping=pb.Stopping(max_tokens=max_tokens, min_tokens=min_tokens),
        )
    except InvalidField:
        return
    sampling, stopping = request.sampling, request.stopping
    assert 0 <= sampling.temperature < math.inf
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert stopping.min_tokens <= stopping.max_tokens
    assert len(request.tokens) + stopping.max_tokens <= MODEL.context
