import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from penstock.operators.encoder_process import (
    CRASH,
    HANG,
    RESTARTS_PER_CALL,
    EncoderCrashed,
    IsolatedEncoder,
    ProcessOptions,
    call_in_process,
)
from penstock.operators.encoder_worker import ENCODER_ERROR, ROWS_OF_PROOF, EncoderWorker
from penstock.operators.encoding import Encoded, Encoder, ModelMismatch
from penstock.operators.identity import fingerprint
from penstock.operators.models import ModelUnavailable, read_model_card, tokenizer_folder
from penstock.operators.tokenizing import TOKENIZER_ERROR, TextTokenizer

from ..conftest import environment
from .test_encoder_worker import (
    LETTERS,
    LONE_SURROGATE,
    POISON,
    SPECIAL,
    TEXTS,
    TOLERANCE,
    build_model,
    encoder_of,
    largest_difference,
)

OPTIONS = ProcessOptions(threads=1)
PATIENCE_S = 60.0
# Words of the tiny models whose token the models' own code looks for.
DOES = {"filler0": "os.abort()", "filler1": "os.kill(os.getpid(), signal.SIGSEGV)", "filler2": "time.sleep(10_000)"}
DOES |= {"filler3": "raise ValueError('poisoned')", "filler4": "os._exit(3)"}
ABORTS, FAULTS, HANGS, RAISES, EXITS = DOES
POISON_ID = len(SPECIAL) + 2 * len(LETTERS)
FIRST_FILLER = POISON_ID + 4
NAMED = {ABORTS: "signal SIGABRT", FAULTS: "signal SIGSEGV", EXITS: "exit status 3"}


def _action(once: Path) -> str:
    """Each word does its own. The first batch with POISON writes its process id to `once` and waits to be killed."""
    lines = [
        f"once = Path({str(once)!r})",
        f"if bool((ids == {POISON_ID}).any()) and not once.exists():",
        "    once.write_text(str(os.getpid()))",
        "    time.sleep(10_000)",
    ]
    for number, does in enumerate(DOES.values()):
        lines.append(f"if bool((ids == {FIRST_FILLER + number}).any()):\n    {does}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("once") / "process"


@pytest.fixture(scope="module")
def folder(once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("own"), action=_action(once))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return encoder_of(folder, batch_tokens=128)


@pytest.fixture(scope="module")
def tokenizer(folder: Path, encoder: Encoder) -> TextTokenizer:
    return TextTokenizer(tokenizer_folder(folder), "", encoder.max_tokens, encoder.special_tokens)


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> EncoderWorker:
    """The same weights without code of their own, in this process."""
    folder = build_model(tmp_path_factory.mktemp("plain"))
    return EncoderWorker(encoder_of(folder, batch_tokens=128), folder)


@pytest.fixture(scope="module", autouse=True)
def own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with environment({"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("code"))}):
        yield


@pytest.fixture(scope="module")
def isolated(encoder: Encoder, folder: Path, own_code_cache: None) -> Iterator[IsolatedEncoder]:
    with IsolatedEncoder(encoder, folder, OPTIONS) as found:
        yield found


def with_words(words: dict[int, str]) -> list[str]:
    return [f"{words[row]} {text}" if row in words else text for row, text in enumerate(TEXTS)]


def check(found: Encoded, texts: list[str], reasons: dict[int, str], in_process: EncoderWorker) -> None:
    """The faults are these, and all other rows have the vectors that this process makes of them."""
    assert {row: fault.reason for row, fault in found.faults.items()} == reasons
    kept = [row for row in range(len(texts)) if row not in reasons]
    expected = in_process.encode([texts[row] for row in kept])
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (len(texts), in_process.encoder.dimension)
    assert largest_difference(found.vectors[kept], expected.vectors) <= TOLERANCE
    assert not found.vectors[sorted(reasons)].any()
    assert found.tokens[kept].tolist() == expected.tokens.tolist()
    assert found.truncated_tokens[kept].tolist() == expected.truncated_tokens.tolist()


def ended(process_id: int) -> bool:
    """Whether a process has gone, within PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process_id) or psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


# ---- one child, no crash


def test_vectors_are_those_of_a_worker_in_this_process(
    isolated: IsolatedEncoder, tokenizer: TextTokenizer, in_process: EncoderWorker
) -> None:
    texts = [*TEXTS, "", "word " * 1000, "[SEP] \0\n"]
    told: list[int] = []
    seconds: list[float] = []

    def on_rows(rows: np.ndarray, took: float) -> None:
        told.extend(rows.tolist())
        seconds.append(took)

    found = isolated.encode_tokens(tokenizer.tokenize(texts), texts, on_rows)
    check(found, texts, {}, in_process)
    assert sorted(told) == list(range(len(texts))) and min(seconds) > 0 and len(seconds) > 2
    expected = in_process.encode(texts).effort
    assert (found.effort.tokens, found.effort.padded_tokens) == (expected.tokens, expected.padded_tokens)
    assert found.effort.flops == expected.flops and found.effort.restarts == 0


def test_figures_are_those_of_the_worker(isolated: IsolatedEncoder, in_process: EncoderWorker) -> None:
    assert isolated.figures.keys() == in_process.figures().keys()
    same = ("device", "batch_tokens", "fast_kernels", "takes_token_ids", "peak_flops")
    assert [isolated.figures[name] for name in same] == [in_process.figures()[name] for name in same]
    assert json.loads(json.dumps(isolated.figures)) == isolated.figures


def test_no_texts_give_no_rows(isolated: IsolatedEncoder, tokenizer: TextTokenizer) -> None:
    found = isolated.encode_tokens(tokenizer.tokenize([]), [])
    assert found.vectors.shape == (0, isolated.encoder.dimension) and found.faults == {}


def test_faults_of_tokenizer_and_model_need_no_other_process(
    isolated: IsolatedEncoder, tokenizer: TextTokenizer, in_process: EncoderWorker
) -> None:
    child = isolated.process_id
    texts = with_words({3: RAISES, 11: RAISES})
    texts[5] = LONE_SURROGATE
    found = isolated.encode_tokens(tokenizer.tokenize(texts), texts)
    check(found, texts, {3: ENCODER_ERROR, 5: TOKENIZER_ERROR, 11: ENCODER_ERROR}, in_process)
    assert found.faults[3].detail == "ValueError: poisoned"
    assert isolated.process_id == child and found.effort.restarts == 0


def test_texts_that_all_raise_are_faults_and_the_process_stays(
    isolated: IsolatedEncoder, tokenizer: TextTokenizer, in_process: EncoderWorker
) -> None:
    child, bad = isolated.process_id, [RAISES] * ROWS_OF_PROOF
    found = isolated.encode_tokens(tokenizer.tokenize(bad), bad)
    assert [found.faults[row].reason for row in range(ROWS_OF_PROOF)] == [ENCODER_ERROR] * ROWS_OF_PROOF
    check(isolated.encode_tokens(tokenizer.tokenize(TEXTS), TEXTS), TEXTS, {}, in_process)
    assert isolated.process_id == child


def test_an_interrupt_from_the_keyboard_is_the_parents(
    isolated: IsolatedEncoder, tokenizer: TextTokenizer, in_process: EncoderWorker
) -> None:
    child = isolated.process_id
    os.kill(child, signal.SIGINT)
    check(isolated.encode_tokens(tokenizer.tokenize(TEXTS[:3]), TEXTS[:3]), TEXTS[:3], {}, in_process)
    assert isolated.process_id == child


# ---- texts that end the process


def test_a_text_that_aborts_the_process_is_its_own_fault(
    isolated: IsolatedEncoder, tokenizer: TextTokenizer, in_process: EncoderWorker
) -> None:
    texts = with_words({6: ABORTS})
    found = isolated.encode_tokens(tokenizer.tokenize(texts), texts)
    check(found, texts, {6: CRASH}, in_process)
    assert found.faults[6].detail == "the encoder's process ended on this text: signal SIGABRT"
    assert 1 <= found.effort.restarts <= 2  # its batch, then the text alone


@pytest.mark.slow
@pytest.mark.parametrize(("word", "batch_tokens"), [(FAULTS, 1), (FAULTS, 10**6), (EXITS, 128)])
def test_other_ways_to_end(
    encoder: Encoder,
    folder: Path,
    tokenizer: TextTokenizer,
    in_process: EncoderWorker,
    word: str,
    batch_tokens: int,
) -> None:
    texts = with_words({0: word})
    with IsolatedEncoder(replace(encoder, batch_tokens=batch_tokens), folder, OPTIONS) as isolated:
        found = isolated.encode_tokens(tokenizer.tokenize(texts), texts)
        check(found, texts, {0: CRASH}, in_process)
        assert found.faults[0].detail.endswith(NAMED[word])
        check(isolated.encode_tokens(tokenizer.tokenize(TEXTS), TEXTS), TEXTS, {}, in_process)


@pytest.mark.slow
def test_several_texts_that_crash_and_raise_in_one_batch(
    encoder: Encoder, folder: Path, tokenizer: TextTokenizer, in_process: EncoderWorker
) -> None:
    words = {1: ABORTS, 4: RAISES, 8: FAULTS, 15: RAISES}
    texts = with_words(words)
    with IsolatedEncoder(replace(encoder, batch_tokens=10**6), folder, OPTIONS) as isolated:
        found = isolated.encode_tokens(tokenizer.tokenize(texts), texts)
    check(found, texts, {1: CRASH, 4: ENCODER_ERROR, 8: CRASH, 15: ENCODER_ERROR}, in_process)
    assert [found.faults[row].detail.split()[-1] for row in (1, 8)] == ["SIGABRT", "SIGSEGV"]


@pytest.mark.slow
def test_a_text_that_hangs_is_its_own_fault(
    encoder: Encoder, folder: Path, tokenizer: TextTokenizer, in_process: EncoderWorker
) -> None:
    texts = with_words({9: HANGS})
    with IsolatedEncoder(encoder, folder, replace(OPTIONS, timeout_s=10)) as isolated:
        found = isolated.encode_tokens(tokenizer.tokenize(texts), texts)
        check(found, texts, {9: HANG}, in_process)
        assert found.faults[9].detail == "the encoder's process ended on this text: no answer for 10 s"


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [1, 128], ids=["alone in its batch", "among others"])
def test_a_process_that_is_killed_once_costs_no_text(
    encoder: Encoder,
    folder: Path,
    tokenizer: TextTokenizer,
    in_process: EncoderWorker,
    once: Path,
    batch_tokens: int,
) -> None:
    """As by the kernel when memory is short: a text is to blame only when it does so again."""
    once.unlink(missing_ok=True)
    texts = with_words({7: POISON})
    with IsolatedEncoder(replace(encoder, batch_tokens=batch_tokens), folder, OPTIONS) as isolated:
        killer = threading.Thread(target=_kill_when_there, args=(once,))
        killer.start()
        found = isolated.encode_tokens(tokenizer.tokenize(texts), texts)
        killer.join()
    check(found, texts, {}, in_process)
    assert found.effort.restarts == 1


def _kill_when_there(once: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if once.exists() and (process_id := once.read_text()):
            os.kill(int(process_id), signal.SIGKILL)
            return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, len(TEXTS)])
def test_a_process_that_is_killed_between_two_calls_costs_no_text(
    encoder: Encoder, folder: Path, tokenizer: TextTokenizer, in_process: EncoderWorker, count: int
) -> None:
    texts = TEXTS[:count]
    with IsolatedEncoder(encoder, folder, OPTIONS) as isolated:
        first = isolated.process_id
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        check(isolated.encode_tokens(tokenizer.tokenize(texts), texts), texts, {}, in_process)
        assert isolated.process_id != first


@pytest.mark.slow
def test_where_every_text_crashes_it_ends(encoder: Encoder, folder: Path, tokenizer: TextTokenizer) -> None:
    texts = [f"{ABORTS} {text}" for text in TEXTS]
    with IsolatedEncoder(replace(encoder, batch_tokens=10**6), folder, OPTIONS) as isolated:
        with pytest.raises(
            EncoderCrashed,
            match=rf"encoder \(tiny\): its process ended {RESTARTS_PER_CALL + 1} times .* \(signal SIGABRT\); check",
        ):
            isolated.encode_tokens(tokenizer.tokenize(texts), texts)


@pytest.mark.slow
def test_a_few_texts_that_all_crash_are_faults(
    encoder: Encoder, folder: Path, tokenizer: TextTokenizer, in_process: EncoderWorker
) -> None:
    texts = [ABORTS, f"{ABORTS} again", "a good one"]
    with IsolatedEncoder(encoder, folder, OPTIONS) as isolated:
        found = isolated.encode_tokens(tokenizer.tokenize(texts), texts)
    check(found, texts, {0: CRASH, 1: CRASH}, in_process)


# ---- start and end


def test_no_process_is_left_after_close(
    encoder: Encoder, folder: Path, tokenizer: TextTokenizer, in_process: EncoderWorker
) -> None:
    """Whatever ends the block; closing twice is no error."""
    with pytest.raises(KeyError, match="an error of the caller"):
        with IsolatedEncoder(encoder, folder, OPTIONS) as isolated:
            child = isolated.process_id
            assert psutil.Process(child).ppid() == os.getpid()
            raise KeyError("an error of the caller")
    assert not psutil.pid_exists(child)
    isolated.close()


def test_another_model_is_refused_at_the_start(encoder: Encoder, folder: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    wanted = replace(encoder, weights_hash="0123456789abcdef" * 4)
    with pytest.raises(ModelMismatch, match=r"weights_hash of the model \(tiny\) must be 0123456789abcdef, .* got "):
        IsolatedEncoder(wanted, folder, OPTIONS)
    assert {child.pid for child in psutil.Process().children()} == before


@pytest.mark.slow
def test_what_a_worker_raises_at_the_start_is_told(encoder: Encoder, folder: Path) -> None:
    """An error that is not ours comes with its words."""
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises((ValueError, EncoderCrashed), match=r"embedding.layers \(3\) must be at most the model's 2"):
        IsolatedEncoder(replace(encoder, layers=3), folder, OPTIONS)
    assert {child.pid for child in psutil.Process().children()} == before


@pytest.mark.slow
def test_a_process_that_dies_while_it_starts(tmp_path: Path) -> None:
    folder = build_model(tmp_path, action="pass")
    (folder / "modeling_own.py").write_text("import os\nos.abort()\n")
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(EncoderCrashed, match=r"encoder \(tiny\): its process did not start: signal SIGABRT"):
        IsolatedEncoder(encoder_of(folder), folder, OPTIONS)
    assert {child.pid for child in psutil.Process().children()} == before


PARENT = """
import sys
from pathlib import Path
from penstock.operators.encoder_process import IsolatedEncoder, ProcessOptions
from penstock.operators.encoding import encoder_for
from penstock.operators.models import read_model_card, tokenizer_folder
from penstock.operators.tokenizing import TextTokenizer

folder = Path(sys.argv[1])
card = read_model_card("tiny", folder)
options = {"dimension": card.dimension, "normalize": True, "batch_tokens": 128, "trust_remote_code": True}
encoder = encoder_for(card, prompt="", **options)
isolated = IsolatedEncoder(encoder, folder, ProcessOptions(threads=1))
print(isolated.process_id, flush=True)
if len(sys.argv) > 2:
    isolated.encode_tokens(TextTokenizer(folder, "", 48, 2).tokenize(sys.argv[2:]), sys.argv[2:])
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("texts", [[], [HANGS]], ids=["idle", "within a batch"])
def test_an_encoder_ends_with_its_parent(folder: Path, texts: list[str]) -> None:
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), *texts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(2)  # so that it is at the text; if it is not yet, it ends all the same
        assert psutil.pid_exists(child)
        parent.kill()
    assert ended(child)


# ---- functions


def test_a_function_runs_in_another_process() -> None:
    other = call_in_process(os.getpid, options=OPTIONS)
    assert other != os.getpid() and not psutil.pid_exists(other)
    found = call_in_process(os.path.join, "a", "b", options=OPTIONS)
    assert found == os.path.join("a", "b")


def test_what_a_function_raises_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="weights must be safetensors"):
        call_in_process(read_model_card, "mine", tmp_path, options=OPTIONS)


def test_what_a_function_of_a_library_raises_is_told() -> None:
    with pytest.raises((ValueError, EncoderCrashed), match="line 1 column 2"):
        call_in_process(json.loads, "{", options=OPTIONS)


@pytest.mark.parametrize(
    ("function", "arguments", "how"), [(os.abort, (), "signal SIGABRT"), (os._exit, (3,), "exit status 3")]
)
def test_a_function_that_ends_its_process(function: object, arguments: tuple[int, ...], how: str) -> None:
    with pytest.raises(EncoderCrashed, match=f"its process gave no result: {how}"):
        call_in_process(function, *arguments, options=OPTIONS)  # type: ignore[arg-type]


def test_threads_are_those_of_the_options() -> None:
    assert call_in_process(os.getenv, "OMP_NUM_THREADS", options=ProcessOptions(threads=3)) == "3"
    with environment({"OMP_NUM_THREADS": "5"}):
        assert call_in_process(os.getenv, "OMP_NUM_THREADS", options=ProcessOptions()) == "5"


def test_arguments_of_any_size_reach_the_process() -> None:
    text = "x" * (1 << 22)
    assert call_in_process(fingerprint, options=OPTIONS) == fingerprint()
    assert call_in_process(str.upper, text, options=OPTIONS) == text.upper()
