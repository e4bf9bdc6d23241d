"""Waiting for a server: which questions are asked, what follows from the answers, which calls are given up."""

from __future__ import annotations

import pytest

from tramontane.client import DeadlineExceeded, NotFound, Tls, Unauthenticated, Unavailable, Unimplemented
from tramontane.client.diagnosis import UNKNOWN, Ask, Diagnosis, Look, Standing, diagnose
from tramontane.client.failures import Kind, read_failure
from tramontane.client.tls_look import Seen
from tramontane.client.waiting_calls import PATIENCE_S, WaitingCalls
from tramontane.protos import serving_pb2

TARGET = "a.example:1"
FAILING = "connections to all backends failing; last error: "
CLOSED = Unavailable(f"{FAILING}UNAVAILABLE: ipv4:10.0.0.1:1: Socket closed")
UNHEALTHY = Unavailable(f"{FAILING}ipv4:10.0.0.1:1: backend unhealthy")
UNREACHED = Diagnosis(standing=Standing.UNREACHED, reason="nobody there")
AWAITED = Diagnosis(standing=Standing.AWAITED, reason="loading")


def ask(answers: dict, *, tls: Tls | None = None, failure=None) -> Diagnosis:
    """Run a diagnosis with these answers. A question that has none fails the test."""
    questions = diagnose(TARGET, tls, failure)
    try:
        question = next(questions)
        while True:
            question = questions.send(answers[question])
    except StopIteration as end:
        return end.value


def models(reason: str) -> serving_pb2.ListModelsResponse:
    return serving_pb2.ListModelsResponse(models=[serving_pb2.ModelInfo(name="m", reason=reason)])


@pytest.mark.parametrize(
    ("answers", "standing", "reason"),
    [
        ({Ask.HEALTH: "an answer"}, Standing.SERVING, ""),
        ({Ask.HEALTH: NotFound("no such service")}, Standing.SERVING, ""),
        ({Ask.HEALTH: DeadlineExceeded("Deadline Exceeded")}, Standing.UNKNOWN, ""),
        (
            {Ask.HEALTH: Unavailable("shutting down")},
            Standing.AWAITED,
            "a.example:1 does not serve (shutting down)",
        ),
        (
            {Ask.HEALTH: UNHEALTHY, Ask.MODELS: models("linking")},
            *(Standing.AWAITED, "a.example:1 does not serve (linking)"),
        ),
        ({Ask.HEALTH: UNHEALTHY, Ask.MODELS: models("")}, Standing.AWAITED, "a.example:1 does not serve"),
        (
            {Ask.HEALTH: UNHEALTHY, Ask.MODELS: Unavailable("loading, 3 %")},
            *(Standing.AWAITED, "a.example:1 does not serve (loading, 3 %)"),
        ),
        ({Ask.HEALTH: UNHEALTHY, Ask.MODELS: DeadlineExceeded("late")}, Standing.AWAITED, "a.example:1 does not serve"),
        ({Ask.HEALTH: UNHEALTHY, Ask.MODELS: Unimplemented("?")}, Standing.AWAITED, "a.example:1 does not serve"),
        (
            {Ask.HEALTH: UNHEALTHY, Ask.MODELS: Unauthenticated("the token is not known")},
            *(Standing.HOPELESS, "the token is not known"),
        ),
        (
            {Ask.HEALTH: CLOSED, Look("10.0.0.1:1"): Seen.NOTHING},
            *(
                Standing.UNREACHED,
                "a.example:1 (10.0.0.1:1) closes connections before a word: is it a server of Tramontane?",
            ),
        ),
        (
            {Ask.HEALTH: CLOSED, Look("10.0.0.1:1"): Seen.SPEAKS_TLS},
            *(Standing.HOPELESS, "a.example:1 speaks TLS, and the client does not; give it tls (--tls, or --ca FILE)"),
        ),
    ],
)
def test_what_is_made_of_the_answers(answers, standing, reason):
    diagnosis = ask(answers)
    assert (diagnosis.standing, diagnosis.reason) == (standing, reason)


def test_a_token_that_is_not_known_ends_a_call_as_it_would_later():
    diagnosis = ask({Ask.HEALTH: UNHEALTHY, Ask.MODELS: Unauthenticated("the token is not known")})
    assert isinstance(diagnosis.error("r-1"), Unauthenticated)


def test_a_failure_that_is_known_is_not_asked_about_and_a_servers_own_words_stand():
    assert ask({}, failure=Unavailable("loading, 43 %")).reason == ""
    assert ask({}, failure=Unavailable(f"{FAILING}UNKNOWN: ipv4:1.2.3.4:1: Connection refused")).standing is (
        Standing.UNREACHED
    )


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        # As grpcio 1.85 says it where no test can bring it about, and as other versions do.
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:10.0.0.1:1: Failed to connect to remote "
            "host: connect: Connection refused (111)",
            *(Kind.UNREACHED, "nobody listens at a.example:1 (10.0.0.1:1)"),
        ),
        (
            f"{FAILING}UNKNOWN: ipv6:%5B::1%5D:1: Failed to connect to remote host: No route to host",
            *(Kind.UNREACHED, "a.example:1 ([::1]:1) cannot be reached (No route to host)"),
        ),
        (
            "DNS resolution failed for a.example:1: C-ares status is not ARES_SUCCESS qtype=A name=a.example "
            "is_balancer=0: Domain name not found",
            *(Kind.UNREACHED, "the host of a.example:1 is not known (Domain name not found)"),
        ),
        (
            f"{FAILING}UNKNOWN: ipv4:10.0.0.1:1: Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1: "
            "SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: certificate has expired: OK",
            *(Kind.HOPELESS, "is not trusted (certificate has expired)"),
        ),
        (
            f"{FAILING}UNKNOWN: ipv4:10.0.0.1:1: Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: "
            "error:10000410:SSL routines:OPENSSL_internal:SSLV3_ALERT_HANDSHAKE_FAILURE",
            *(Kind.HOPELESS, "the TLS handshake with a.example:1 (10.0.0.1:1) failed (SSLV3_ALERT_HANDSHAKE_FAILURE)"),
        ),
        (
            f"{FAILING}UNAVAILABLE: ipv4:10.0.0.1:1: Handshake read failed (Endpoint closing)",
            *(Kind.UNREACHED, "takes connections and says nothing"),
        ),
        (
            "Received http2 header with status: 404",
            *(Kind.HOPELESS, "what answers at a.example:1 speaks HTTP, not gRPC (status 404)"),
        ),
        ("Received http2 header with status: 503", Kind.UNREACHED, "(status 503)"),
    ],
)
def test_what_grpc_says_and_what_it_means(text, kind, says):
    failure = read_failure(text, TARGET, encrypted=False)
    assert failure.kind is kind
    assert says in failure.sentence


@pytest.mark.parametrize("text", ["loading, 43 %", "the pipeline broke", "Socket closed", ""])
def test_what_a_server_says_is_no_failure_of_the_channel(text):
    assert read_failure(text, TARGET, encrypted=False) is None


def waiting_calls(reach_timeout_s: float = 30.0) -> WaitingCalls[str]:
    return WaitingCalls(reach_timeout_s)


def test_nobody_looks_before_a_call_has_waited_a_while():
    waiting = waiting_calls()
    assert not waiting.look_due(0.0)
    waiting.add("a", 0.0)
    assert not waiting.look_due(PATIENCE_S / 2)
    assert waiting.look_due(PATIENCE_S)
    waiting.update(UNREACHED, 1.0)
    assert not waiting.look_due(1.5)
    assert waiting.look_due(2.0)


def test_a_server_that_is_not_reached_ends_the_calls_that_have_tried_long_enough():
    waiting = waiting_calls(30.0)
    waiting.add("early", 0.0)
    waiting.add("late", 10.0)
    assert not waiting.update(UNREACHED, 29.0)
    assert waiting.reason == "nobody there"
    given_up = waiting.update(UNREACHED, 30.0)
    assert list(given_up) == ["early"]
    assert given_up["early"].reason == "nobody there (tried for 30 s)"


def test_one_that_answers_begins_the_count_anew():
    waiting = waiting_calls(30.0)
    waiting.add("a", 0.0)
    assert not waiting.update(UNREACHED, 29.0)
    assert not waiting.update(AWAITED, 29.5)
    assert not waiting.update(UNREACHED, 59.0)
    assert waiting.update(UNREACHED, 59.5)


def test_one_that_loads_is_waited_for_without_end_and_no_answer_changes_nothing():
    waiting = waiting_calls(30.0)
    waiting.add("a", 0.0)
    assert not waiting.update(AWAITED, 1000.0)
    assert not waiting.update(UNKNOWN, 2000.0)
    assert waiting.reason == "loading"


def test_what_is_hopeless_ends_all_calls():
    waiting = waiting_calls()
    waiting.add("a", 0.0)
    waiting.add("b", 1.0)
    diagnosis = Diagnosis(standing=Standing.HOPELESS, reason="another authority")
    assert waiting.update(diagnosis, 1.0) == {"a": diagnosis, "b": diagnosis}


def test_a_call_that_has_ended_is_not_given_up_and_leaves_no_reason():
    waiting = waiting_calls(1.0)
    waiting.add("a", 0.0)
    waiting.update(UNREACHED, 0.5)
    waiting.remove("a")
    assert (waiting.reason, waiting.update(UNREACHED, 5.0)) == ("", {})
